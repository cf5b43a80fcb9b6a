"""IBQ and ETT where the tolerances of the files are too wide to see a mistake: other betas of Adam, no average of
weights, a resize that is not OpenCV's, a GELU that is not exact."""

import importlib
from pathlib import Path

import pytest
import torch
from vectors import Vectors

VECTORS = Vectors(Path(__file__).parent / "ett" / "golden-tiny.json")


def run(case):
    return importlib.import_module("systems.ett").run(VECTORS, case)


@pytest.mark.parametrize(("kind", "allowed"), [("after", 5e-7), ("ema", 2e-9)])
def test_two_steps_end_at_the_published_weights(kind, allowed):
    outputs, answers = run("train_step"), VECTORS.answers("train_step")
    names = [name for name in answers if name.startswith(f"{kind}.")]
    assert names
    for name in names:
        assert (outputs[name].double() - answers[name].double()).abs().max() <= allowed, name


def test_images_are_resized_to_the_same_bytes():
    outputs = run("prep")
    for name, answer in VECTORS.answers("prep").items():
        levels, expected = (((values + 1) * 127.5).round() for values in (outputs[name], answer))
        assert torch.equal(levels, expected), name
        torch.testing.assert_close(outputs[name], answer, rtol=0, atol=1e-6)


def test_the_projector_has_the_exact_gelu():
    name = "image_embeddings"
    error = run("ett_stage1")[name] - VECTORS.answers("ett_stage1")[name]
    assert error.abs().max() <= 2e-5

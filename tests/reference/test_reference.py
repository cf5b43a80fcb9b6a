"""Every system returns what its authors' code returned: indices equal, floats within the tolerance of the file.

Any folder of the same form is tested too: pytest tests/reference --vectors DIR. An adapter tests/reference/systems/
<system>.py computes the outputs of a case by name; everything that a file stores for a case must be there and equal.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from vectors import Vectors, part

import zoo
from zoo.registry import presets

HERE = Path(__file__).parent


def files(config) -> list[Path]:
    folders = [HERE] + ([Path(config.getoption("--vectors")).resolve()] if config.getoption("--vectors") else [])
    found = []
    for folder in folders:
        golden = sorted(folder.glob("*/golden-*.json"))
        if not golden:
            raise pytest.UsageError(f"{folder} holds no <system>/golden-*.json")
        found += golden
    return found


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        parameters = []
        for path in files(metafunc.config):
            vectors = Vectors(path)
            if not (HERE / "systems" / f"{vectors.system}.py").is_file():
                raise pytest.UsageError(f"{path}: the zoo has no system '{vectors.system}'")
            if not vectors.cases:
                raise pytest.UsageError(f"{path} holds no case")
            if orphans := vectors.orphans():
                raise pytest.UsageError(f"{path}: answers of no case: {', '.join(orphans[:10])}")
            name = path.stem.removeprefix("golden-")
            parameters += [pytest.param(vectors, case, id=f"{vectors.system}-{name}-{case}") for case in vectors.cases]
        metafunc.parametrize(("vectors", "case"), parameters)
    if "layout" in metafunc.fixturenames:
        layouts = [(path.parent.name, json.loads(path.read_text())) for path in sorted(HERE.glob("*/layout.json"))]
        parameters = [
            pytest.param(system, entry, id=f"{system}-layout-{name}")
            for system, layout in layouts
            for name, entry in layout.items()
        ]
        metafunc.parametrize(("system", "layout"), parameters)


def test_the_zoo_returns_the_numbers_of_the_published_code(vectors: Vectors, case: str):
    about = vectors.cases[case]
    answers, expected = vectors.answers(case), about.get("expected", {})
    assert answers or expected, f"nothing is stored for case {case}"
    outputs = importlib.import_module(f"systems.{vectors.system}").run(vectors, case)
    for name, answer in answers.items():
        assert name in outputs, f"the adapter computes no output '{name}'"
        ours = part(outputs[name], str(about["outputs"].get(name, ""))).detach()
        assert ours.shape == answer.shape, f"{name}: shape {tuple(ours.shape)} instead of {tuple(answer.shape)}"
        if not answer.is_floating_point():
            assert torch.equal(ours, answer), f"{name}: {(ours != answer).sum()} of {answer.numel()} differ"
        elif answer.numel():
            error = (ours.double() - answer.double()).abs().max().item()
            allowed = about["atol"] + about["rtol"] * answer.double().abs().max().item()
            assert error <= allowed, f"{name}: off by {error:.3g}, allowed {allowed:.3g}"
    for name, answer in expected.items():
        assert name in outputs, f"the adapter computes no answer '{name}'"
        assert outputs[name] == answer, f"{name} differs"


def test_the_published_sizes_have_the_published_names_and_shapes(system: str, layout: dict):
    adapter = importlib.import_module(f"systems.{system}")
    with torch.device("meta"):
        state = adapter.published_state(layout["config"])
    theirs = {name: tuple(shape) for name, shape, *_ in layout["keys"]}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == theirs


@pytest.mark.parametrize("name", sorted(presets()))
def test_every_preset_can_be_built(name: str):
    with torch.device("meta"):
        assert zoo.create_tokenizer(name).info.name == name

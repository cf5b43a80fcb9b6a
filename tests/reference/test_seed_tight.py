"""SEED at a tenth of the tolerance: what the files allow is too wide to see a wrong eps of a LayerNorm."""

import importlib
from pathlib import Path

import pytest
from vectors import Vectors

VECTORS = Vectors(Path(__file__).parent / "seed" / "golden-tiny.json")
CASES = [name for name in VECTORS.cases if not name.startswith("stage1_itc")]  # gradients of fused attention


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_those_of_the_published_code_to_a_tenth(case):
    about, outputs = VECTORS.cases[case], importlib.import_module("systems.seed").run(VECTORS, case)
    for name, answer in VECTORS.answers(case).items():
        if answer.is_floating_point():
            error = (outputs[name].detach().double() - answer.double()).abs().max().item()
            assert error <= 0.1 * (about["atol"] + about["rtol"] * answer.double().abs().max().item()), name

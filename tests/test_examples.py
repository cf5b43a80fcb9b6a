"""Each script of examples/ as a user would start it, from a folder of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = {
    "load_and_reconstruct": (["--count=2"], "reconstructions.png", "ids (2, 64) of 512 codes"),
    "compare_lengths": (["--count=2"], "lengths.png", "quality 0.12: tokens of each image"),
    "tokens_to_language_model": ([], "images_as_words.png", "are those that were put in: True"),
    "zero_shot": (["--count=2"], "zero_shot.png", "siglip-tiny: the caption of a scene is the nearest of 64 for "),
    "generate": (["--count=2", "--num-steps=3"], "generated.png", "a row for each of blue, red"),
    "train_from_python": (["--steps=3", "--batch-size=4"], "trained.png", "dB after 3 steps"),
    "tokenize_dataset": ([], "decoded.png", "512 samples; the first has "),
}


def test_every_script_is_run_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == SCRIPTS.keys()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_makes_its_picture(name, tmp_path):
    options, picture, line = SCRIPTS[name]
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", "--output=out", *options],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert line in done.stdout
    with Image.open(tmp_path / "out" / picture) as image:
        assert min(image.size) >= 64
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50

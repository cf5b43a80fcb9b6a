"""What FSQ promises, and the whole path from installing it to evaluating what was trained."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fsq.quantizer import ScalarQuantizer
from fsq.tokenizer import FSQConfig, FSQTokenizer
from vector_quantize_pytorch import FSQ

from zoo import ZooError

HERE = Path(__file__).parent
SIZES = {"image_size": 32, "channels": 8, "multipliers": (1, 2, 2), "num_blocks": 1, "attention": (), "norm_groups": 4}


@pytest.fixture
def quantizer():
    return ScalarQuantizer((8, 5, 4, 3))


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return FSQTokenizer(FSQConfig(**SIZES)).eval()


def test_ids_and_codes_are_those_of_another_implementation(quantizer):
    z = 2 * torch.randn(4000, 4, generator=torch.Generator().manual_seed(0))
    bounded = quantizer.bounded(z)
    clear = ((bounded - bounded.floor() - 0.5).abs() > 0.01).all(1)  # that one bounds by a thousandth more
    z, peer = z[clear], FSQ([8, 5, 4, 3])
    codes, ids = peer(z[None])
    assert len(z) > 3000
    assert torch.equal(quantizer.encode(z), ids[0].long())
    torch.testing.assert_close(quantizer.codes(ids[0].long()), codes[0])


def test_every_id_has_a_code_of_its_own(quantizer):
    ids = torch.arange(480)
    codes = quantizer.codes(ids)
    assert quantizer.num_codes == len(codes.unique(dim=0)) == 480
    assert torch.equal(quantizer.ids_of(codes * (quantizer.levels // 2)), ids)
    assert codes.abs().max() <= 1


def test_what_is_rounded_keeps_the_gradient_of_what_was_bounded(quantizer):
    z = torch.randn(50, 4, requires_grad=True)
    out = quantizer(z)
    torch.testing.assert_close(out.quantized, quantizer.codes(out.ids))
    assert out.loss == 0
    (grad,) = torch.autograd.grad(out.quantized.sum(), z)
    (expected,) = torch.autograd.grad((quantizer.bounded(z) / (quantizer.levels // 2)).sum(), z)
    torch.testing.assert_close(grad, expected)


def test_a_batch_equals_its_images_one_by_one(tokenizer):
    images = torch.rand(3, 3, 32, 48)
    tokens = tokenizer.encode(images)
    assert tokens.ids["image"].shape == (3, 96)
    assert tokens.grid == (8, 12)
    for i, image in enumerate(images):
        assert torch.equal(tokenizer.encode(image[None]).ids["image"], tokens[i].ids["image"])
    assert tokenizer.decode(tokens).shape == images.shape
    assert tokenizer.embed(tokens).shape == (3, 96, 4)


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ({"levels": (8, 1, 5, 5)}, r"at least 2 values for each number of a code, got \(8, 1, 5, 5\)"),
        ({"levels": (8, 8)}, r"embed_dim must be 2 for levels \(8, 8\)"),
    ],
)
def test_levels_that_make_no_sense_are_refused(sizes, complaint):
    with pytest.raises(ZooError, match=complaint):
        FSQTokenizer(FSQConfig(**SIZES | sizes))


def test_installed_it_is_listed_trained_and_evaluated_like_any_other(tmp_path):
    shutil.copytree(HERE, tmp_path / "source", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target"]
    subprocess.run([sys.executable, *install, tmp_path / "installed", tmp_path / "source"], check=True)
    paths = [str(tmp_path / "installed"), str(HERE.parents[1])]

    def zoo(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "zoo", *arguments],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, text=True,
            timeout=900, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "fsq-tiny" in zoo("list", "fsq*")
    small = "tokenizer.channels=8", "tokenizer.norm_groups=4", "data.batch_size=4", "schedule.warmup_steps=2"
    steps = "trainer.max_steps=20", "trainer.log_every_n_steps=1", "optimizer.lr=5e-3", "callbacks.ema.decay=0.5"
    zoo("train", "--config-dir", str(HERE / "conf"), "experiment=fsq-tiny", *small, *steps, "output_dir=run")
    with (tmp_path / "run/metrics.csv").open() as file:
        losses = [float(row["train/pixels"]) for row in csv.DictReader(file)]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    zoo("evaluate", "tokenizer=fsq-tiny", "weights=run/tokenizer.safetensors", "limit=8", "output_dir=report")
    report = json.loads((tmp_path / "report/metrics.json").read_text())
    assert report["rows"][0]["name"] == "fsq-tiny"

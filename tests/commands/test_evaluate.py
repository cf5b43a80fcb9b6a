"""The true command, on small folders of images."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d

import zoo
from zoo import weights
from zoo.commands.evaluate import main

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class MosaicConfig:
    decodes_to: str = "pixels"
    token_kind: str = "discrete"


class Mosaic(zoo.Tokenizer):
    """A 4 x 4 raster of the mean grey of each square, in 16 steps; the first `keep` of them are live."""

    Config = MosaicConfig

    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.tensor(15.0))
        discrete = config.token_kind == "discrete"
        self.info = zoo.TokenizerInfo(
            system="mosaic",
            paper="none",
            image_size=16,
            size_multiple=None,
            channels=3,
            kind=config.token_kind,
            streams=("image",),
            max_tokens=16,
            codebook_sizes={"image": 16} if discrete else {},
            latent_dims={} if discrete else {"image": 1},
            variable_length=True,
            decodes_to=config.decodes_to,
        )

    def _encode(self, images, keep=16):
        grey = avg_pool2d(images.mean(1), 4).flatten(1) * self.scale
        mask = torch.arange(16, device=grey.device).expand(len(grey), -1) < keep
        if self.info.kind == "continuous":
            return zoo.Tokens(latents={"image": grey[..., None]}, mask=mask, grid=(4, 4))
        return zoo.Tokens(ids={"image": grey.round().long()}, mask=mask, grid=(4, 4))

    def _decode(self, tokens):
        values = tokens.ids["image"] if tokens.ids else tokens.latents["image"][..., 0]
        values = torch.where(tokens.mask, values / self.scale, 0.5).view(-1, 1, 4, 4)
        return values.repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)


for name, config in {
    "mosaic": MosaicConfig(),
    "mosaic-latents": MosaicConfig(token_kind="continuous"),
    "mosaic-embedding": MosaicConfig("embedding"),
}.items():
    zoo.register_tokenizer(name, zoo.Preset(Mosaic, config, "for tests"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Nine photographs of random squares, nine depth maps of the same, and the weights that make them tokens."""
    folder = tmp_path_factory.mktemp("evaluate")
    draw = np.random.RandomState(0)
    for name in ("photos", "depth"):
        (folder / name).mkdir()
        for i in range(9):
            coarse = draw.randint(0, 256, (4, 4, 3) if name == "photos" else (4, 4)).astype(np.uint8)
            Image.fromarray(coarse).resize((16, 16), Image.NEAREST).save(folder / name / f"{i}.png")
    weights.save(folder / "mosaic.safetensors", Mosaic(MosaicConfig()).state_dict())
    return folder


@pytest.fixture(autouse=True)
def no_weights_of_other_networks(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def evaluate(folder, tmp_path, *overrides, tokenizer="mosaic", output="out"):
    arguments = [f"tokenizer={tokenizer}", "data=folder", f"data.path={folder}/photos", "data.image_size=16"]
    arguments += [f"weights={folder}/mosaic.safetensors", "metrics.auto.pixels.fd.features=mosaic-latents"]
    arguments += ["device=cpu", "data.num_workers=0", f"output_dir={tmp_path / output}"]
    assert main([*arguments, *overrides]) == 0
    return json.loads((tmp_path / output / "metrics.json").read_text())


def test_the_report_is_complete(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("zoo.metrics.frechet.load_tokenizer", zoo.create_tokenizer)
    report = evaluate(folder, tmp_path, "batch_size=4")
    protocol, run = report["protocol"], report["run"]
    assert protocol["images"] == 9
    assert protocol["image_size"] == [16, 16]
    assert protocol["data"]["path"] == f"{folder}/photos"
    assert protocol["data"]["batch_size"] == 4
    assert len(protocol["weights"]["sha256"]) == 64
    for key in (
        "tokenizer",
        "split",
        "resize",
        "crop",
        "encode",
        "dtype",
        "seed",
        "stored_as",
        "metrics",
        "limit",
    ):
        assert key in protocol
    assert run["versions"].keys() == {"python", "torch", "zoo", "torchmetrics", "lightning"}
    assert run.keys() >= {"date", "command", "device", "devices"}
    ours, thumbnail = report["rows"]
    for key in ("mae", "psnr", "ssim", "fd[mosaic-latents]"):
        assert ours["metrics"][key] > 0
        assert thumbnail["metrics"][key] > 0
    for key in ("encode_per_second", "decode_per_second", "peak_process_memory", "codebook_use/image"):
        assert ours["metrics"][key] > 0
    assert (ours["metrics"]["tokens_mean"], ours["metrics"]["bits"]) == (16, 64 + 16)  # and which are live
    assert (thumbnail["metrics"]["numbers"], thumbnail["metrics"]["bits"]) == (12, 384)
    assert Image.open(tmp_path / "out/reconstructions.png").width > 500
    table = capsys.readouterr().out
    assert "PSNR, dB ↑" in table
    assert "FD[mosaic-latents] ↓" in table


def test_what_is_missing_is_said_with_file_and_folder_and_the_rest_goes_on(folder, tmp_path, capsys):
    (row, _) = evaluate(folder, tmp_path, "~metrics.auto.pixels.fd")["rows"]
    for key, file in (("lpips", "alexnet-owt-7be5be79.pth"), ("rfid", "weights-inception-2015-12-05-6726825d.pth")):
        assert row["metrics"][key] is None
        assert file in row["missing"][key]
        assert str(tmp_path / "torch/hub/checkpoints") in row["missing"][key]
    assert row["metrics"]["psnr"] > 0
    assert "alexnet-owt-7be5be79.pth" in capsys.readouterr().out


def test_a_list_of_settings_is_a_row_for_each(folder, tmp_path, capsys):
    report = evaluate(folder, tmp_path, "encode.keep=[4,16]", "~metrics.auto.pixels.fd")
    assert [row["settings"] for row in report["rows"]] == [{"keep": 4}, {"keep": 4}, {"keep": 16}, {"keep": 16}]
    assert [row["metrics"].get("tokens_mean") for row in report["rows"]] == [4, None, 16, None]
    assert report["rows"][0]["metrics"]["psnr"] < report["rows"][2]["metrics"]["psnr"]
    assert len(list((tmp_path / "out").glob("reconstructions-*.png"))) == 2
    assert Image.open(tmp_path / "out/rate-distortion.png").width > 500
    _, table = capsys.readouterr().out.split("settings of encode, one a line")
    lines = [line.split("│")[1:-1] for line in table.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in line[:4]] for line in lines] == [["4", "4", "4", "4"], ["16", "16", "16", "16"]]


def test_an_embedding_has_tokens_and_speed_only(folder, tmp_path):
    (row,) = evaluate(folder, tmp_path, tokenizer="mosaic-embedding")["rows"]
    assert row["metrics"]["perplexity/image"] > 1
    assert row["metrics"]["encode_per_second"] > 0
    assert not row["metrics"].keys() & {"psnr", "lpips", "decode_per_second"}
    assert not row["missing"]


def test_reconstructions_are_scored_as_the_files_that_hold_them(folder, tmp_path):
    plain, png, jpeg = (
        evaluate(folder, tmp_path, "~metrics.auto.pixels.fd", f"stored_as={form}") for form in ("null", "png", "jpeg")
    )
    assert [one["protocol"]["stored_as"] for one in (plain, png, jpeg)] == [None, "png", "jpeg"]
    assert png["rows"][0]["metrics"]["psnr"] == plain["rows"][0]["metrics"]["psnr"]  # 17 k / 255 is a byte
    assert png["rows"][1]["metrics"]["psnr"] != plain["rows"][1]["metrics"]["psnr"]
    assert jpeg["rows"][0]["metrics"]["psnr"] != plain["rows"][0]["metrics"]["psnr"]


class Perfect(Mosaic):
    """Gives the images back as they are."""

    def _encode(self, images, keep=16):
        self.seen = images
        return super()._encode(images, keep)

    def _decode(self, tokens):
        return self.seen


zoo.register_tokenizer("perfect", zoo.Preset(Perfect, MosaicConfig(), "for tests"))


def test_a_frechet_distance_compares_two_folders_of_files(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("zoo.metrics.frechet.load_tokenizer", zoo.create_tokenizer)
    ours, _ = evaluate(folder, tmp_path, "stored_as=jpeg", tokenizer="perfect")["rows"]
    assert ours["metrics"]["psnr"] < 50  # of the file against the crop
    assert ours["metrics"]["fd[mosaic-latents]"] == pytest.approx(0, abs=1e-6)


def test_two_ranks_report_what_one_rank_reports(folder, tmp_path):
    tiny = ["tokenizer=aurora-tiny", "tokenizer.hidden_dim=4", "tokenizer.codebook_dim=8", "tokenizer.image_size=16"]
    sizes = {"hidden_dim": 4, "codebook_dim": 8, "image_size": 16}
    torch.manual_seed(0)
    zoo.save_tokenizer(zoo.create_tokenizer("aurora-tiny", **sizes), tmp_path / "tiny.safetensors")
    arguments = [*tiny, f"weights={tmp_path}/tiny.safetensors", "data=folder", f"data.path={folder}/depth"]
    arguments += ["data.num_workers=0", "data.image_size=16", "batch_size=2", "device=cpu"]
    arguments += ["limit=7", "~metrics.auto.depth.fd"]
    command = [sys.executable, "evaluate.py", *arguments, "devices=2", f"output_dir={tmp_path}/2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert ranks.returncode == 0, ranks.stdout + ranks.stderr
    assert ranks.stdout.count("AbsRel") == 1
    assert main([*arguments, f"output_dir={tmp_path}/1"]) == 0
    one, two = (json.loads((tmp_path / str(n) / "metrics.json").read_text()) for n in (1, 2))
    assert one["protocol"] == two["protocol"]
    assert (one["run"]["devices"], two["run"]["devices"]) == (1, 2)
    for ours, theirs in zip(one["rows"], two["rows"], strict=True):
        for name, value in ours["metrics"].items():
            if not name.endswith("per_second") and not name.startswith("peak"):
                assert theirs["metrics"][name] == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["encode.kep=3"], "no setting encode.kep; did you mean keep?"),
        (["metrics=depth", "~metrics.fd"], "metrics.errors is for tokenizers that decode to depth"),
        (
            ["+metrics.order={_target_: zoo.metrics.order.MarkerOrder}"],
            "metrics.order is for tokenizers that decode to",
        ),
        (["metrics.auto.pixels.lpips.net=alexx"], "alex, vgg, squeeze"),
        (["metrics.auto.pixels.fd.features=mosaik"], "did you mean mosaic"),
        (["dtype=float33"], "dtype must be one of float32"),
        (["limit=0"], "limit must be an integer of at least 1, got 0"),
        (["baseline=perhaps"], "baseline must be true or false"),
        (["stored_as=gif"], "stored_as must be one of png, jpeg, got 'gif'"),
        (["device=abacus"], "abacus"),
        (["weights=nowhere.safetensors"], "'nowhere.safetensors' does not exist"),
        (["tokenizer=mosaik"], "did you mean mosaic"),
        (["data.path=nowhere"], "nowhere is not there"),
        (["data.image_size=20"], "of 16 x 16 pixels, got 20 x 20"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(folder, tmp_path, capfd, overrides, complaint):
    arguments = ["tokenizer=mosaic", "data=folder", f"data.path={folder}/photos", "data.image_size=16", "device=cpu"]
    arguments += [f"weights={folder}/mosaic.safetensors", "data.num_workers=0", f"output_dir={tmp_path}"]
    fd = [] if any("fd" in override for override in overrides) else ["~metrics.auto.pixels.fd"]
    assert main([*arguments, *fd, *overrides]) == 2
    error = capfd.readouterr().err.strip()
    assert complaint in error
    assert len(error.splitlines()) == 1, error

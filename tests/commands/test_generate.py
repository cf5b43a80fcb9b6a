"""The true command, with a generator and an autoencoder of random weights."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import zoo
from zoo import registry
from zoo.commands.generate import main

SIZES = {"grid": 4, "width": 32, "encoder_depth": 1, "decoder_depth": 1, "encoder_heads": 2, "decoder_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    torch.manual_seed(0)
    registry.save(zoo.create_generator("xar-tiny", entity_size=2, **SIZES), folder / "generator.safetensors")
    zoo.save_tokenizer(zoo.create_tokenizer("kl-tiny", image_size=32), folder / "kl.safetensors")
    return folder


def arguments(folder, output, *overrides):
    return [
        *(
            "generator=xar-tiny",
            f"weights={folder}/generator.safetensors",
            f"tokenizer_weights={folder}/kl.safetensors",
        ),
        *("num_steps=3", "num_images=6", "batch_size=4", "device=cpu", f"output_dir={output}"),
        *overrides,
    ]


def generate(folder, output, *overrides):
    assert main(arguments(folder, output, *overrides)) == 0
    return json.loads((output / "generation.json").read_text())


def images(output):
    return np.stack([np.asarray(Image.open(path)) for path in sorted((output / "images").glob("*.png"))])


@pytest.fixture(autouse=True)
def no_weights_of_other_networks(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def test_everything_that_was_promised_is_there(folder, tmp_path, capsys):
    report = generate(folder, tmp_path, "classes=[blue,3]")
    assert report["labels"] == [5, 5, 5, 3, 3, 3]
    assert report["protocol"]["guidance"] == 2.0
    assert report["protocol"]["num_steps"] == 3
    assert "weights-inception" in report["missing"]["Inception Score"]
    found = images(tmp_path)
    assert found.shape == (6, 32, 32, 3)
    archive = np.load(tmp_path / "samples.npz")
    np.testing.assert_array_equal(archive["arr_0"], found)
    assert archive["arr_1"].tolist() == report["labels"]
    assert Image.open(tmp_path / "grid.png").width > 64
    assert "blue, green" in capsys.readouterr().out


def test_an_image_does_not_depend_on_batches_ranks_or_an_interruption(folder, tmp_path, zoo_command):
    generate(folder, tmp_path / "whole")
    generate(folder, tmp_path / "small", "batch_size=1")
    (tmp_path / "again").mkdir()
    generate(folder, tmp_path / "again")
    for number in (1, 4):
        (tmp_path / f"again/images/{number:06d}.png").unlink()
    generate(folder, tmp_path / "again")
    zoo_command("generate", *arguments(folder, tmp_path / "ranks", "devices=2"))
    whole = images(tmp_path / "whole")
    for other in ("small", "again", "ranks"):
        assert np.abs(whole.astype(int) - images(tmp_path / other)).max() <= 1  # of 255


def test_the_distance_to_a_reference_is_small_for_the_images_themselves(folder, tmp_path):
    one = generate(folder, tmp_path / "one", "features=aurora-tiny")
    assert "FD[aurora-tiny]" not in one["metrics"]
    reference = f"reference={tmp_path}/one/samples.npz"
    same = generate(folder, tmp_path / "one", "features=aurora-tiny", reference)["metrics"]["FD[aurora-tiny]"]
    other = generate(folder, tmp_path / "other", "features=aurora-tiny", reference, "seed=1")
    assert same < 1e-4 < other["metrics"]["FD[aurora-tiny]"]
    missing = generate(folder, tmp_path / "one", reference)["missing"]
    assert "weights-inception" in missing["FID"]


def test_images_of_another_protocol_are_not_mixed(folder, tmp_path, capfd):
    generate(folder, tmp_path, "num_images=1")
    assert main(arguments(folder, tmp_path, "num_images=1", "seed=1")) == 2
    assert "was begun with another seed" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["classes=[bleu]"], "there is no class 'bleu'; did you mean blue"),
        (["classes=[8]"], "classes are numbers from 0 to 7, got 8"),
        (["classes=[]"], "an empty list"),
        (["guidance=-1"], "guidance must not be below 0"),
        (["num_images=0"], "num_images must be an integer of at least 1, got 0"),
        (["generator.tokenizer=vqgan-tiny", "tokenizer_weights=null"], "vqgan-tiny has discrete tokens"),
        (["generator=xar-tinny"], "did you mean xar-tiny"),
        (["sampler=dpm"], "sampler must be one of sde, euler, heun, got 'dpm'"),
        (["reference=nothing.npz"], "reference=nothing.npz is no .npz that can be read"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(folder, tmp_path, capfd, overrides, complaint):
    assert main(arguments(folder, tmp_path, *overrides)) == 2
    error = capfd.readouterr().err.strip()
    assert complaint in error
    assert len(error.splitlines()) == 1, error

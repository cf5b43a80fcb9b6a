"""The true command on the embedded scenes."""

import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
import torch

import zoo
from zoo.commands.pretokenize import main
from zoo.data import Loader, folder
from zoo.quantizers import GaussianPosterior


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 10 images, each with its number as caption."""
    from PIL import Image

    path = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(10):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path / f"{i}.png")
    return path


def arguments(pictures, output, *overrides):
    data = ("data=folder", f"data.path={pictures}", "data.num_workers=0", "batch_size=3", "num_shards=3", "device=cpu")
    return [*data, f"output_dir={output}", *overrides]


def pretokenize(pictures, output, *overrides):
    assert main(arguments(pictures, output, *overrides)) == 0
    return json.loads((output / "manifest.json").read_text())


def samples(output):
    """{key: batch of one} of everything in the shards, with the field of the moments."""
    shards = [str(path) for path in sorted(output.glob("*.tar"))]
    return {b["key"][0]: b for b in Loader(shards, batch_size=1, fields=["moments"])}


def test_moments_read_back_are_those_of_the_images_and_their_mirrors(pictures, tmp_path):
    manifest = pretokenize(pictures, tmp_path, "tokenizer=kl-tiny", "flip=true", "array_dtype=float32")
    assert manifest["samples"] == 10
    assert sorted(shard["samples"] for shard in manifest["shards"].values()) == [3, 3, 4]
    for name, shard in manifest["shards"].items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == shard["sha256"]
    tokenizer, found = zoo.load_tokenizer("kl-tiny"), samples(tmp_path)
    for batch in Loader(folder(pictures), batch_size=1, fields=["image"]):
        stored = torch.as_tensor(found.pop(batch["key"][0].replace(".", "_"))["moments"])[0]
        for view, image in zip(stored, (batch["image"], batch["image"].flip(-1)), strict=True):
            with torch.no_grad():
                posterior = tokenizer.posterior(tokenizer.config.to_values(image))
            mean, logvar = GaussianPosterior.from_moments(view[None])
            torch.testing.assert_close(mean, posterior.mean, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(logvar, posterior.logvar, rtol=1e-4, atol=1e-4)
    assert not found


def test_shards_do_not_depend_on_ranks_or_an_interruption(pictures, tmp_path, zoo_command):
    pretokenize(pictures, tmp_path / "one", "tokenizer=karl-tiny")
    pretokenize(pictures, tmp_path / "again", "tokenizer=karl-tiny")
    (tmp_path / "again/00001.tar").unlink()
    (tmp_path / "again/.00001.tar.part").write_bytes(b"half a shard")
    pretokenize(pictures, tmp_path / "again", "tokenizer=karl-tiny")
    zoo_command("pretokenize", *arguments(pictures, tmp_path / "two", "tokenizer=karl-tiny", "devices=2"))
    for number in range(3):
        one, again, two = ((tmp_path / f / f"{number:05d}.tar").read_bytes() for f in ("one", "again", "two"))
        assert one == again == two


def test_ids_take_the_smallest_type_that_holds_them(pictures, tmp_path):
    pretokenize(pictures, tmp_path, "tokenizer=karl-tiny")
    with tarfile.open(tmp_path / "00000.tar") as tar:
        files = {name.split(".", 1)[1]: tar.extractfile(name).read() for name in tar.getnames() if "npy" in name}
    members = {name: np.load(io.BytesIO(data)) for name, data in files.items()}
    size = zoo.load_tokenizer("karl-tiny").info.codebook_sizes["image"]
    assert members["image.ids.npy"].dtype == np.min_scalar_type(size - 1)
    assert members["mask.npy"].dtype == bool
    assert members["mask.npy"].shape == members["image.ids.npy"].shape == (1, 64)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["num_shards=0"], "num_shards must be an integer of at least 1, got 0"),
        (["array_dtype=float8"], "array_dtype must be one of float32, bfloat16, float16, got 'float8'"),
        (["data.fields=[image,grid]"], "data.fields cannot have grid, which is written anyway"),
        (["split=val"], "split=val, and the data has none"),
        (["tokenizer=kl-tinny"], "did you mean kl-tiny"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(pictures, tmp_path, capfd, overrides, complaint):
    assert main(arguments(pictures, tmp_path, "tokenizer=kl-tiny", *overrides)) == 2
    error = capfd.readouterr().err.strip()
    assert complaint in error
    assert len(error.splitlines()) == 1, error


def test_tokens_of_another_protocol_are_not_mixed(pictures, tmp_path, capfd):
    pretokenize(pictures, tmp_path, "tokenizer=kl-tiny")
    assert main(arguments(pictures, tmp_path, "tokenizer=kl-tiny", "flip=true")) == 2
    assert "was begun with another flip" in capfd.readouterr().err

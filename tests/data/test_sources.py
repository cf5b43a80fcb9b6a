import gzip
import io
import random
import tarfile
from pathlib import Path

import pytest
import webdataset
from data_helpers import keys, picture, write_tar
from PIL import Image

from zoo.data import Loader, folder, photos, scenes, shards
from zoo.data.sources import BadSample, Patience, Streams, Tars, resolve
from zoo.errors import ZooError


def read(source) -> list[dict]:
    return [source.read(unit, i) for unit, size in enumerate(source.sizes) for i in range(size)]


def without_url(raw: dict) -> dict:
    return {name: value for name, value in raw.items() if name != "__url__"}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_shard_is_read_as_webdataset_reads_it(tmp_path, form):
    names = ["a/0.rgb.PNG", "a/0.json", "é.txt", "x" * 90 + "/" + "y" * 90 + ".txt", "__skipped__/0.txt", "no-suffix"]
    names += [] if form == tarfile.USTAR_FORMAT else ["long/" + "z" * 300 + ".txt"]
    path = str(tmp_path / "shard.tar")
    with tarfile.open(path, "w", format=form) as tar:
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = 100 * i, 1.5
            tar.addfile(info, io.BytesIO(bytes([i]) * info.size))
            folder = tarfile.TarInfo(f"folder{i}")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
    ours = [without_url(raw) for raw in read(shards(path))]
    assert ours == [without_url(raw) for raw in shards(f"pipe:cat {path}").stream([f"pipe:cat {path}"])]
    assert ours == [
        {name: value for name, value in raw.items() if name not in ("__url__", "__local_path__")}
        for raw in webdataset.WebDataset(path, shardshuffle=False)
    ]
    assert len(ours) == len(names) - 3


def test_shards_are_found_by_braces_wildcards_and_lists(make_shards, tmp_path):
    paths = make_shards(2, 3, 1)
    for pattern in (
        f"{tmp_path}/shard-{{0..2}}.tar",
        f"{tmp_path}/shard-*.tar",
        "::".join(paths),
        paths,
        f"file:{tmp_path}/shard-{{0,1,2}}.tar",
    ):
        assert shards(pattern).paths == paths


def test_what_is_no_local_tar_file_is_a_stream(make_shards, tmp_path):
    (path,) = make_shards(3)
    (tmp_path / "shard.tar.gz").write_bytes(gzip.compress(Path(path).read_bytes()))
    for url in (f"{tmp_path}/shard.tar.gz", f"pipe:cat {path}"):
        source = shards(url)
        assert isinstance(source, Streams)
        assert keys(Loader(source, batch_size=2)) == ["shard0-0", "shard0-1", "shard0-2"]


# --- broken shards ---------------------------------------------------------------------------------------------------


def good_and_bad(path) -> tuple[list[str], list[tuple]]:
    source, good, bad = Tars([str(path)]), [], []
    for i in range(source.sizes[0]):
        try:
            good.append(source.read(0, i)["__key__"])
        except BadSample as error:
            bad.append(error.args)
    return good, bad


def test_a_broken_header_costs_its_sample_and_nothing_behind_it(make_shards):
    path = Path(make_shards(6)[0])
    data = bytearray(path.read_bytes())
    broken = Tars([str(path)]).starts[0][2]
    data[broken + 148 : broken + 156] = b"garbage!"
    path.with_name("broken.tar").write_bytes(data)
    good, bad = good_and_bad(path.with_name("broken.tar"))
    assert [key for key in good if key != "shard0-2"] == ["shard0-0", "shard0-1", "shard0-3", "shard0-4", "shard0-5"]
    assert bad == [(f"{path.with_name('broken.tar')}: byte {broken}", f"no valid tar header at byte {broken}")]


def test_a_shard_that_is_cut_off_loses_its_last_sample(make_shards):
    path = Path(make_shards(4)[0])
    start = int(Tars([str(path)]).starts[0][3])
    path.with_name("cut.tar").write_bytes(path.read_bytes()[: start + 512 + 20])
    good, bad = good_and_bad(path.with_name("cut.tar"))
    assert good == ["shard0-0", "shard0-1", "shard0-2"]
    assert bad == [(f"{path.with_name('cut.tar')}: shard0-3", "the file ends inside the member 'png'")]


def test_an_empty_shard_and_a_shard_that_is_none_are_one_bad_sample_each(tmp_path):
    (tmp_path / "empty.tar").touch()
    assert good_and_bad(tmp_path / "empty.tar") == ([], [(f"{tmp_path}/empty.tar", "the file is empty (0 bytes)")])
    (tmp_path / "none.tar").write_bytes(random.Random(0).randbytes(5000))
    good, bad = good_and_bad(tmp_path / "none.tar")
    assert (good, len(bad)) == ([], 1)


def test_a_suffix_that_comes_twice_is_bad(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("k", {"png": b"1"}), ("k", {"png": b"2"})])
    assert good_and_bad(path) == ([], [(f"{path}: k", "two members 'png'")])


@pytest.mark.parametrize("damage", ["cut", "header", "command"])
def test_where_a_stream_breaks_the_rest_of_the_shard_is_one_bad_sample(make_shards, damage):
    first, second = make_shards(30, 2)
    data = bytearray(Path(first).read_bytes())
    start = int(Tars([first]).starts[0][4])
    if damage == "cut":
        data = data[: start + 512 + 20]
    elif damage == "header":
        data[start : start + 512] = b"x" * 512
    Path(first).with_name("broken.tar").write_bytes(data)
    command = f"pipe:cat {Path(first).with_name('broken.tar')}" + "; exit 3" * (damage == "command")
    *items, one, two = Streams([]).stream([command, f"pipe:cat {second}"], Patience(retries=0))
    assert isinstance(items[-1], BadSample)
    assert items[-1].args[0] == command
    count = len(items) - 1 if damage == "command" else 4  # what a failing command still writes may or may not be read
    assert [raw["__key__"] for raw in items[:-1]] == [f"shard0-{i}" for i in range(count)]
    assert [one["__key__"], two["__key__"]] == ["shard1-0", "shard1-1"]


# --- folders and photographs -----------------------------------------------------------------------------------------


def test_a_folder_is_searched_to_its_depths_in_the_order_of_names(tmp_path):
    for name in ("b/2.PNG", "a.jpeg", "b/c/1.webp", ".hidden.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture(1))
    assert [raw["__key__"] for raw in read(folder(tmp_path))] == ["a.jpeg", "b/2.PNG", "b/c/1.webp"]
    depth = next(iter(Loader(folder(tmp_path, modality="depth"), batch_size=3, fields=["depth"], image_size=4)))
    assert depth["depth"].shape == (3, 1, 4, 4)


def test_a_file_that_vanishes_is_a_bad_sample(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(1))
    source = folder(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(BadSample, match="No such file"):
        source.read(0, 0)


def test_the_photographs_are_in_the_wheel():
    batch = next(iter(Loader(photos(), batch_size=14, image_size=32)))
    assert batch["image"].shape == (14, 3, 32, 32)
    assert batch["image"].flatten(1).std(1).min() > 0.03


def test_the_stereo_pair_has_depth_that_fits_its_picture():
    (batch,) = Loader(photos(["image", "depth"]), batch_size=2, image_size=64, fields=["image", "depth"])
    assert batch["key"] == ["motorcycle_left.png"]
    assert batch["image"].shape == (1, 3, 64, 64)
    assert batch["depth"].min() == 0
    assert 0.9 < batch["depth"].max() <= 1


# --- wrong input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: shards(f"{path}/x-{{0..3}}.tar"), "there is no file .*x-0.tar, one of "),
        (lambda path: shards(f"{path}/*.tar"), r"there is no file .*\*.tar"),
        (lambda path: shards([]), "the list of shards is empty"),
        (lambda path: shards("{0..3.tar"), "there is no file|cannot expand"),
        (lambda path: shards("s3://bucket/a.tar"), "such as 'pipe:aws s3 cp s3://bucket/a.tar -'"),
        (lambda path: shards("${NOT_SET_HERE}.tar"), "cannot expand .*NOT_SET_HERE"),
        (lambda path: shards(f"{path}/picture.png", weight=-1), "weight .* positive"),
        (lambda path: shards(f"{path}/picture.png", depth="disparty"), "did you mean disparity"),
        (lambda path: folder(path / "nowhere"), "nowhere is not there"),
        (lambda path: folder(path / "picture.png"), "picture.png is a file"),
        (lambda path: folder(path / "empty"), "no images in or below"),
        (lambda path: folder(path, modality="video"), "modality='video'"),
        (lambda path: scenes("test"), "neither 'train' nor 'val'"),
        (lambda path: resolve({"url": "a.tar"}), "a data source is urls"),
        (lambda path: resolve(7), "7 is no data source"),
        (lambda path: resolve([{"urls": f"{path}/picture.png", "weight": 1}, folder(path)]), "some have none"),
    ],
)
def test_wrong_sources_are_refused_in_a_sentence(tmp_path, make, message):
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "picture.png")
    with pytest.raises(ZooError, match=message) as error:
        make(tmp_path)
    assert "\n" not in str(error.value)


def test_a_tar_file_without_samples_is_refused(tmp_path):
    path = write_tar(tmp_path / "a.tar", [])
    with pytest.raises(ZooError, match=r"no samples in .*a\.tar"):
        Loader(path, batch_size=1)


def test_the_class_of_a_file_is_the_number_of_its_sub_folder(tmp_path):
    for name in ("dog/b.png", "cat/deep/a.png", "cat/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (batch,) = Loader(folder(tmp_path), batch_size=4, fields=["class"])
    assert (batch["key"], batch["class"]) == (["cat/c.png", "cat/deep/a.png", "dog/b.png"], [0, 0, 1])
    Image.new("RGB", (4, 4)).save(tmp_path / "flat.png")
    with pytest.raises(ZooError, match="no 'class'"):
        list(Loader(folder(tmp_path), batch_size=4, fields=["class"]))

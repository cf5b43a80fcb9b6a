"""What is broken or hostile in data: no hang, the right counts, the right error above the limit."""

import errno
import io
import itertools
import json
import logging
import os
import random
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from data_helpers import encode, keys, picture, write_tar
from PIL import Image

from zoo.data import Loader, folder, shards
from zoo.data.images import read_depth, read_rgb
from zoo.data.sources import BadSample, Patience, Streams, Tars
from zoo.errors import ZooError

GOOD = {"png": picture(1), "json": b'{"caption": "one"}'}
NOISE = encode(Image.effect_noise((8, 8), 50).convert("RGB"))
FAULTS = {
    "cut": GOOD | {"png": NOISE[:-30]},
    "wrong magic": GOOD | {"png": b"GARBAGE!" + NOISE[8:]},
    "noise": GOOD | {"png": random.Random(0).randbytes(200)},
    "empty": GOOD | {"png": b""},
    "bomb": GOOD | {"png": encode(Image.new("1", (5000, 5000)))},
    "no picture": {"json": GOOD["json"]},
    "no caption": GOOD | {"json": b"{}"},
    "half a record": GOOD | {"json": b'{"caption": "o'},
    "no record": GOOD | {"json": b"[1, 2]"},
    "a number": GOOD | {"json": b"7"},
    "a deep record": GOOD | {"json": b"[" * 100_000},
    "not text": GOOD | {"json": b"\xff\xfe"},
}
OPTIONS = {"fields": ["image", "caption"], "image_size": 8, "batch_size": 20, "max_pixels": 10_000, "retries": 0}


@pytest.fixture
def waits(monkeypatch):
    """The seconds for which a retry would wait."""
    slept = []
    monkeypatch.setattr("zoo.data.sources.sleep", slept.append)
    return slept


# --- shares of bad samples -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True], ids=["indexed", "streamed"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("percent", [1, 5, 20])
def test_bad_samples_are_counted_and_are_an_error_above_the_limit(tmp_path, caplog, percent, training, streamed):
    count = 200
    bad = dict(zip(random.Random(percent).sample(range(count), 2 * percent), itertools.cycle(FAULTS)))
    samples = [(f"{i:03}", FAULTS[bad[i]] if i in bad else GOOD) for i in range(count)]
    paths = [write_tar(tmp_path / f"{n}.tar", samples[n::2]) for n in range(2)]
    source = [f"pipe:cat {path}" for path in paths] if streamed else paths
    options = OPTIONS | {"training": training, "num_workers": percent // 5 % 2}  # 0 and 1 of them
    options |= {"samples_per_epoch": count} if streamed and training else {}

    with caplog.at_level(logging.WARNING):
        seen = keys(Loader(source, max_bad_share=percent / 100, **options))
    (record,) = caplog.records
    assert f"{2 * percent} of {count} samples could not be used" in record.message
    assert not {f"{i:03}" for i in bad} & set(seen)
    assert len(seen) == (count if training else count - 2 * percent)

    with pytest.raises(ZooError, match=rf"samples cannot be used, more than max_bad_share={percent / 100 - 0.005}"):
        list(Loader(source, max_bad_share=percent / 100 - 0.005, **options))


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named(tmp_path, fault):
    path = write_tar(tmp_path / "a.tar", [("bad", FAULTS[fault])])
    with pytest.raises(ZooError, match=r"1 of 1 samples cannot be used.*a\.tar: bad: .+") as caught:
        list(Loader(path, **OPTIONS))
    assert "\n" not in str(caught.value)


# --- bombs -----------------------------------------------------------------------------------------------------------


def npy(shape: str, data: bytes = b"", dtype: str = "<f4") -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


def npz(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", data)
    return file.getvalue()


def test_a_picture_of_too_many_pixels_is_not_decoded():
    # 18 MB in the memory of the test, some kB in the file, and of these the header alone
    bomb = encode(Image.new("1", (12_000, 12_000)))[:100]
    with pytest.raises(BadSample, match="12000 x 12000 pixels, over max_pixels=89,478,485"):
        read_rgb("png", bomb)
    assert read_rgb("png", picture(1), max_pixels=64).size == (8, 8)
    with pytest.raises(BadSample, match="8 x 8 pixels, over max_pixels=63"):
        read_depth("depth.png", picture(1), max_pixels=63)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (npz(bytes(10_000)), "10,000 bytes for max_pixels=100"),
        (npz(npy("(1000000000000,)")), "0 bytes for an array"),
        (npz(npy("(-1, 4)", bytes(16))), "16 bytes for an array"),
        (npz(b""), "is no array"),
        (npy("(2,)"), "is no array"),
    ],
)
def test_an_array_is_not_made_as_large_as_its_header_says(data, reason):
    with pytest.raises(BadSample, match=reason):
        read_depth("depth.npz", data, max_pixels=100)


@pytest.mark.parametrize(
    "data", [npy("(1000000000000,)"), npy("(99999999999999999999, 0)"), npy("(1,)", bytes(8), "|O"), npy("(2,)", b"1")]
)
def test_members_of_arrays_are_checked_as_well(tmp_path, data):
    path = write_tar(tmp_path / "a.tar", [("a", {"x.npy": data})])
    with pytest.raises(ZooError, match=r"'x\.npy' is no whole array"):
        list(Loader(path, batch_size=1, fields=["x"]))


def test_no_program_in_a_picture_is_run():
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "EPS")  # which Pillow would give to Ghostscript
    with pytest.raises(BadSample, match="is no whole picture"):
        read_rgb("png", file.getvalue())


# --- tar files -------------------------------------------------------------------------------------------------------


def test_names_and_links_lead_nowhere(tmp_path):
    """Nothing is written or followed: such names are keys like others, and what is no file is no member."""
    (tmp_path / "secret.png").write_bytes(picture(7))
    path = str(tmp_path / "shard.tar")
    with tarfile.open(path, "w") as tar:
        for name in ("../up.png", "/etc/absolute.png", "a/../../b.png", "plain.png"):
            info = tarfile.TarInfo(name)
            info.size = len(picture(1))
            tar.addfile(info, io.BytesIO(picture(1)))
        for i, kind in enumerate(
            (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
        ):
            info = tarfile.TarInfo(f"special{i}.png")
            info.type, info.linkname = kind, str(tmp_path / "secret.png")
            tar.addfile(info)
    before = sorted(os.listdir(tmp_path))
    for source in (path, f"pipe:cat {path}"):
        assert keys(Loader(source, batch_size=8)) == ["../up", "/etc/absolute", "a/../../b", "plain"]
    assert sorted(os.listdir(tmp_path)) == before


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    block = bytearray(512)
    block[: len(name)], block[124 : 124 + len(size)], block[156:157] = name, size, kind
    block[148:156] = b"%06o\0 " % (sum(block) + 8 * ord(" "))
    return bytes(block)


HEADERS = {
    "backwards": header(b"x.png", b"-0000002000"),
    "forever": header(b"x.png", b"\x80" + b"\xff" * 11),
    "large": header(b"x.png", b"77777777777"),
    "endless names": header(b"x", b"77777777777", b"L"),
    "endless records": header(b"x", b"77777777777", b"x"),
    "a record of no length": header(b"x", b"00000000003", b"x") + b"0 a".ljust(512, b"\0"),
    "a record that leads back": header(b"x", b"00000000021", b"x")
    + b"17 size=-00001024\n".ljust(512, b"\0")
    + header(b"x.png", b"00000000000"),
    "a record without a number": header(b"x", b"00000000014", b"x")
    + b"12 size=abc\n".ljust(512, b"\0")
    + header(b"x.png", b"00000000000"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_costs_no_more_than_what_is_behind_it(tmp_path, name):
    whole = Path(write_tar(tmp_path / "good.tar", [(f"good{i}", GOOD) for i in range(3)])).read_bytes()
    end = int(Tars([str(tmp_path / "good.tar")]).starts[0][2])
    path = tmp_path / "bad.tar"
    path.write_bytes(whole[:end] + HEADERS[name] + whole[end:])

    source, found = Tars([str(path)]), []
    for i in range(source.sizes[0]):
        try:
            found.append(source.read(0, i)["__key__"])
        except BadSample:
            found.append(None)
    assert found[:2] == ["good0", "good1"]
    assert None in found
    assert len(found) <= 4
    *streamed, last = Streams([]).stream([f"pipe:cat {path}"])
    assert [raw["__key__"] for raw in streamed[:2]] == ["good0", "good1"]
    assert isinstance(last, BadSample) or last["__key__"] == "good2"


# --- what does not answer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("cat {}; sleep 1000", "no byte came for 1 s"),
        ("cat {} && exec >&- && sleep 1000", "its command does not end within 1 s"),
        ("sleep 1000", "no byte came for 1 s"),
        ("cat {} /dev/zero", "goes on behind the end"),
        ("yes", "file could not be opened|truncated|bad checksum|header"),
    ],
)
def test_a_pipe_without_an_end_is_given_up(tmp_path, command, reason):
    path = write_tar(tmp_path / "good.tar", [(f"good{i}", GOOD) for i in range(3)])
    mark = f"#{tmp_path}"
    url = "pipe:" + command.format(path) + f" {mark}"
    *samples, last = Streams([]).stream([url], Patience(timeout=1, retries=0))
    assert isinstance(last, BadSample)
    assert any(part in last.args[1] for part in reason.split("|"))
    assert [raw["__key__"] for raw in samples] in ([], ["good0", "good1"], ["good0", "good1", "good2"])
    processes = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(mark.encode() in line for line in processes), "the command lives on"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pipe_without_an_end_is_an_error_of_the_loader(workers):
    options = {"batch_size": 2, "num_workers": workers, "timeout": 0.2, "retries": 0}
    with pytest.raises(ZooError, match=r"1 of 1 samples cannot be used.*no byte came for 0.2 s"):
        list(Loader("pipe:sleep 1000", **options))


def test_a_member_of_a_stream_is_not_read_into_memory_whatever_its_size(tmp_path):
    (tmp_path / "a.tar").write_bytes(header(b"x.png", b"77777777777"))
    (bad,) = Streams([]).stream([f"pipe:cat {tmp_path}/a.tar /dev/zero"])
    assert "'x.png' would have 8,589,934,591 bytes" in bad.args[1]


@pytest.mark.parametrize("given", [0, 700, 2500, 100_000], ids=["nothing", "half a sample", "some", "all"])
def test_a_stream_that_fails_for_a_while_is_retried_and_no_sample_lost_or_doubled(tmp_path, waits, caplog, given):
    path = write_tar(tmp_path / "a.tar", [(str(i), GOOD) for i in range(5)])
    tries = tmp_path / "tries"
    flaky = (
        f"pipe:echo >> {tries}; if [ $(wc -l < {tries}) -lt 3 ]; then head -c {given} {path}; exit 7; fi; cat {path}"
    )
    with caplog.at_level(logging.WARNING):
        assert keys(Loader(flaky, batch_size=2, fields=["image", "caption"])) == ["0", "1", "2", "3", "4"]
    assert waits in ([1, 2], [1, 1])  # from 1 again where the first retry went further
    assert "its command failed with exit code 7" in caplog.records[0].message
    assert "retry 1 of 5 in 1 s" in caplog.records[0].message


def test_a_stream_that_fails_for_good_is_given_up_after_its_retries(tmp_path, waits):
    (bad,) = Streams([]).stream(["pipe:exit 7"], Patience(retries=4))
    assert bad.args == ("pipe:exit 7", "its command failed with exit code 7 (the rest of it is not read)")
    assert waits == [1, 2, 4, 8]


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_a_file_system_that_fails_for_a_while_is_retried(tmp_path, waits, monkeypatch, caplog, kind):
    (tmp_path / "a.png").write_bytes(picture(3))
    source = folder(tmp_path) if kind == "folder" else shards(write_tar(tmp_path / "a.tar", [("a", GOOD)]))
    loader = Loader(source, batch_size=1)
    name = {"folder": "pathlib.Path.read_bytes", "shards": "os.pread"}[kind]
    working = {"folder": Path.read_bytes, "shards": os.pread}[kind]
    failures = iter([OSError(errno.EIO, os.strerror(errno.EIO)), OSError(errno.ESTALE, os.strerror(errno.ESTALE))])

    def failing(*args):
        for error in failures:
            raise error
        return working(*args)

    monkeypatch.setattr(name, failing)
    assert len(keys(loader)) == 1
    assert waits == [1, 2]
    assert "cannot be read (Input/output error); retry 1 of 5 in 1 s" in caplog.records[0].message


def test_a_file_that_is_gone_is_not_waited_for(tmp_path, waits):
    path = write_tar(tmp_path / "a.tar", [("a", GOOD)])
    source = shards(path)
    assert source.sizes.tolist() == [1]
    os.unlink(path)
    with pytest.raises(BadSample, match="No such file"):
        source.read(0, 0)
    with pytest.raises(ZooError, match=r"cannot read the shard .*b\.tar: No such file"):
        Loader(Tars([str(tmp_path / "b.tar")]), batch_size=1)
    assert not waits


@pytest.mark.parametrize(
    ("options", "message"),
    [({"timeout": 0}, "timeout must be"), ({"retries": -1}, "retries must be"), ({"max_pixels": 0}, "max_pixels must")],
)
def test_wrong_limits_are_refused(tmp_path, options, message):
    path = write_tar(tmp_path / "a.tar", [("a", {"json": json.dumps({"n": np.pi}).encode()})])
    with pytest.raises(ZooError, match=message):
        Loader(path, batch_size=1, **options)

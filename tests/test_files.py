import errno
import json
import os

import numpy as np
import pytest
import torch

from zoo import Tokens, ZooError, weights
from zoo.files import write_json, writing
from zoo.training.callbacks import read_rows
from zoo.training.checkpoints import WholeCheckpoints

WRITERS = {
    "weights": lambda path, n: weights.save(path, {"a": torch.full((1000,), n)}),
    "checkpoint": lambda path, n: WholeCheckpoints().save_checkpoint({"a": torch.full((1000,), n)}, path),
    "tokens": lambda path, n: Tokens({"image": torch.full((2, 3), n)}).save(path),
    "json": lambda path, n: write_json(path, {"n": [n] * 1000}),
}


class Dead(BaseException):
    """Where the process would be killed."""


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("when", ["fsync", "replace"])
def test_a_file_is_the_earlier_one_until_it_is_whole(tmp_path, monkeypatch, write, when):
    path = tmp_path / "file"
    write(path, 1)
    earlier = path.read_bytes()

    def die(*args):
        raise Dead

    with monkeypatch.context() as patch:
        patch.setattr(os, when, die)
        with pytest.raises(Dead):
            write(path, 2)
    assert path.read_bytes() == earlier
    write(path, 2)
    assert path.read_bytes() != earlier
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("when", ["write", "fsync"])
def test_a_full_disk_is_one_sentence_and_leaves_the_earlier_file(tmp_path, monkeypatch, write, when):
    """/dev/full takes nothing; file systems with delayed allocation only say so when they sync."""
    path = tmp_path / "file"
    write(path, 1)
    earlier = path.read_bytes()
    if when == "write":
        (tmp_path / ".file.part").symlink_to("/dev/full")
    else:

        def full(*args):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ZooError, match=r"cannot write .*/file \(No space left on device\); make room") as caught:
        write(path, 2)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == earlier
    assert os.listdir(tmp_path) == ["file"]


def test_what_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ZooError, match=r"cannot write .*/file/below.json \(File exists\); choose"):
        write_json(tmp_path / "file/below.json", {})


def test_an_error_that_has_nothing_to_do_with_the_disk_stays_what_it_is(tmp_path):
    def write():
        with writing(tmp_path / "a") as file:
            file.write(b"half")
            (tmp_path / "nowhere").read_bytes()

    with pytest.raises(FileNotFoundError):
        write()
    assert not os.listdir(tmp_path)


def test_files_are_for_all_whom_the_mask_of_the_process_lets_read_them(tmp_path):
    for name, write in WRITERS.items():
        write(tmp_path / name, 1)
    (tmp_path / "plain").touch()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
    assert json.loads((tmp_path / "json").read_text())["n"][0] == 1
    assert torch.load(tmp_path / "checkpoint")["a"][0] == np.float32(1)


def test_a_row_of_metrics_that_was_not_written_to_its_end_is_left_out(tmp_path):
    (tmp_path / "metrics.csv").write_bytes(b"loss,step\r\n0.5,99\r\n0.4,10")
    assert read_rows(tmp_path / "metrics.csv") == [{"loss": "0.5", "step": "99"}]

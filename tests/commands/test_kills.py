"""Trainings that are killed with SIGKILL go on to the very weights of one that never was."""

import csv
import random
import time

import pytest
import torch
from kill_helpers import Trainings

from zoo import ZooError
from zoo.commands import cli
from zoo.commands.train import train

STEPS = 12
TINY = [
    *("experiment=aurora-tiny", "tokenizer.hidden_dim=4", "tokenizer.codebook_dim=8", "tokenizer.codebook_size=16"),
    *("data.batch_size=2", "data.num_workers=0", f"trainer.max_steps={STEPS}", "trainer.log_every_n_steps=1"),
    *("trainer.val_check_interval=5", "trainer.limit_val_batches=1", "callbacks.checkpoint.every_n_train_steps=2"),
    *("callbacks.pictures.num_images=1", "callbacks.progress=null"),
]
KILLS, A_LIFE = 20, 4
"""Random kills, and how many of them a run has to survive."""


@pytest.fixture(scope="module")
def trainings():
    return Trainings(cli.compose("train", TINY))


@pytest.fixture(scope="module")
def whole(trainings, tmp_path_factory):
    """What a run leaves that is never killed, for a number of ranks, and how many seconds its steps took."""
    runs = {}

    def run(ranks):
        if ranks not in runs:
            folder = tmp_path_factory.mktemp("whole") / "run"
            processes, began = begin(trainings, folder, ranks)
            assert not any(trainings.finish(processes)), told(folder)
            runs[ranks] = content(folder), time.monotonic() - began
        return runs[ranks]

    return run


def begin(trainings, folder, ranks=1):
    """The processes of a training that is in its first step, and the time."""
    mark = folder.with_suffix(".begun")
    mark.unlink(missing_ok=True)
    processes = trainings.start(folder, ranks=ranks, Begun={"path": str(mark)})
    while not mark.exists() and all(process.exitcode is None for process in processes):
        time.sleep(0.002)
    return processes, time.monotonic()


def content(folder):
    """All that decides how a training goes on, its final weights, and the steps that it logged."""
    saved = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    with (folder / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert steps == list(range(STEPS))
    kept = "state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "global_step", "train_row"
    return {name: saved[name] for name in kept} | {"file": (folder / "tokenizer.safetensors").read_bytes()}


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        names = one.keys() - {"train/images_per_second"}
        return names == other.keys() - {"train/images_per_second"} and all(equal(one[n], other[n]) for n in names)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def told(folder):
    return "".join(path.read_text() for path in sorted(folder.parent.glob(f"{folder.name}-*.txt")))


def assert_ends_as(whole, trainings, folder, ranks=1):
    part = folder / "checkpoints/.best.ckpt.part"
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(b"of one killed while it wrote")
    assert not any(trainings.finish(trainings.start(folder, ranks=ranks))), told(folder)
    killed = content(folder)
    for name, expected in whole.items():
        assert equal(expected, killed[name]), name
    assert not list(folder.rglob("*.part"))


def test_killed_at_random_moments(trainings, whole, tmp_path):
    expected, seconds = whole(1)
    rng, kills = random.Random(0), 0
    for number in range(KILLS):  # more than enough, unless each is done before its kill
        folder = tmp_path / f"run{number}"
        for _ in range(A_LIFE):
            (process,), began = begin(trainings, folder)
            time.sleep(max(0, began + rng.uniform(0, 0.6 * seconds) - time.monotonic()))
            process.kill()
            process.join()
            kills += process.exitcode == -9
            if process.exitcode != -9:  # done before its kill: the whole run was measured on a busier machine
                seconds = min(seconds, time.monotonic() - began)
                break
        assert_ends_as(expected, trainings, folder)
        if kills >= KILLS:
            return
    raise AssertionError(f"only {kills} kills came in time")


def test_killed_while_files_are_written(trainings, whole, tmp_path):
    expected, folder = whole(1)[0], tmp_path / "run"
    for kill in (
        *(("last.ckpt", 1, moment) for moment in ("write", "replaced", "fsync", "replace", "write")),
        *(("metrics.csv", 1, "replace"), ("best.ckpt", 1, "fsync"), ("config.yaml", 1, "write")),
        ("tokenizer.safetensors", 1, "write"),
    ):
        assert trainings.finish(trainings.start(folder, kill=kill)) == [-9], f"{kill}: {told(folder)}"
        assert not (folder / "tokenizer.safetensors").exists()
    assert_ends_as(expected, trainings, folder)


def test_one_rank_of_two_is_killed(trainings, whole, tmp_path):
    expected, seconds = whole(2)
    rng, victims, number = random.Random(0), [1, 0, 1], 0
    while victims:
        folder = tmp_path / f"run{number}"
        processes, began = begin(trainings, folder, ranks=2)
        time.sleep(rng.uniform(0.1, 0.4) * seconds)
        processes[victims[0]].kill()
        codes = trainings.finish(processes)
        if codes == [0, 0]:  # done before its kill, as above
            seconds, number = min(seconds, time.monotonic() - began) / 2, number + 1
            continue
        victim = victims.pop(0)
        assert codes[victim] == -9
        assert codes[1 - victim] > 0, told(folder)
    assert_ends_as(expected, trainings, folder, ranks=2)


@pytest.mark.parametrize(("hook", "step"), [("on_before_backward", 3), ("on_validation_batch_start", 5)])
def test_an_error_inside_a_step_or_validation_leaves_the_checkpoint_before(trainings, whole, tmp_path, hook, step):
    folder = tmp_path / "run"
    assert trainings.finish(trainings.start(folder, Fails={"hook": hook, "step": step})) == [1]
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == step - 1
    assert_ends_as(whole(1)[0], trainings, folder)


def test_a_full_disk_is_an_error_and_leaves_the_last_good_checkpoint(trainings, whole, tmp_path):
    folder = tmp_path / "run"
    full = {"after": 6, "size": 10_000}
    assert trainings.finish(trainings.start(folder, FullDisk=full)) == [1]
    assert "ZooError: cannot write" in told(folder)
    assert "last.ckpt (File too large); make room" in told(folder)
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
    assert_ends_as(whole(1)[0], trainings, folder)


@pytest.mark.parametrize("size", [0, 1000])
def test_a_checkpoint_that_is_not_whole_is_not_gone_on_from(tmp_path, size):
    last = tmp_path / "checkpoints/last.ckpt"
    last.parent.mkdir()
    torch.save({"global_step": 3, "train_row": {}, "weights": torch.zeros(1000)}, last)
    last.write_bytes(last.read_bytes()[:size])
    with pytest.raises(ZooError, match=r"last\.ckpt is not a whole checkpoint .*copy it again") as caught:
        train(cli.compose("train", [*TINY, f"output_dir={tmp_path}", "resume=true"]))
    assert "\n" not in str(caught.value)

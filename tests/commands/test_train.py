"""The true entry point, with small overrides."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import zoo
from zoo.commands import cli

ROOT = Path(__file__).parents[2]
TINY = [
    *("experiment=aurora-tiny", "trainer.log_every_n_steps=1", "trainer.limit_val_batches=1", "data.batch_size=8"),
    *("data.num_workers=0", "tokenizer.hidden_dim=4", "tokenizer.codebook_dim=8", "tokenizer.codebook_size=16"),
]


def start(*overrides, entry=("train.py",)):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *entry, *overrides]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process, code=0):
    output = process.communicate(timeout=300)[0]
    assert process.returncode == code, output
    return output


def steps(folder):
    with (folder / "metrics.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_goes_on_to_the_same_weights_as_one_never_killed(tmp_path, kill):
    saving = [*TINY, "trainer.max_steps=30", "callbacks.checkpoint.every_n_train_steps=4", "data.num_workers=1"]
    whole = start(*saving, f"output_dir={tmp_path}/whole")
    killed = start(*saving, f"output_dir={tmp_path}/killed")
    last = tmp_path / "killed/checkpoints/last.ckpt"
    while not last.is_file() and killed.poll() is None:
        time.sleep(0.01)
    killed.send_signal(kill)
    killed.communicate(timeout=300)
    assert killed.returncode != 0
    assert not (tmp_path / "killed/tokenizer.safetensors").exists()
    finish(whole)

    finish(start(*saving, f"output_dir={tmp_path}/killed", "resume=true"))
    one, other = (
        zoo.load_tokenizer("aurora-tiny", weights=tmp_path / run / "tokenizer.safetensors").state_dict()
        for run in ("whole", "killed")
    )
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
    assert steps(tmp_path / "killed") == steps(tmp_path / "whole") == list(range(30))


def test_two_ranks_train_as_one_rank_with_their_batches_together(tmp_path):
    runs = {"one": ["data.batch_size=8"], "two": ["trainer.devices=2", "data.batch_size=4"]}
    processes = [start(*TINY, "trainer.max_steps=5", *o, f"output_dir={tmp_path}/{run}") for run, o in runs.items()]
    for process in processes:
        assert "trained 5 steps" in finish(process)
    one, two = (
        zoo.load_tokenizer("aurora-tiny", weights=tmp_path / run / "tokenizer.safetensors").state_dict() for run in runs
    )
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_a_run_leaves_everything_behind_that_was_promised(tmp_path):
    output = finish(start("train", *TINY, "trainer=tiny-debug", f"output_dir={tmp_path}", entry=("-m", "zoo")))
    assert f"are in {tmp_path}" in output
    for name in (
        "config.yaml",
        "metrics.csv",
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
        "tokenizer.safetensors",
    ):
        assert (tmp_path / name).is_file(), name
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 2
    weights = tmp_path / "checkpoints/last.ckpt"
    assert zoo.load_tokenizer("aurora-tiny", weights=weights, hidden_dim=4, codebook_dim=8, codebook_size=16)


def test_multirun_gives_each_job_its_folder(tmp_path):
    sweep = ["trainer=tiny-debug", "trainer.max_steps=1", "optimizer.lr=1e-4,3e-4", f"output_dir={tmp_path}"]
    finish(start("-m", *TINY, *sweep))
    assert len(list(tmp_path.glob("*/tokenizer.safetensors"))) == 2


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["experiment=aurora-tinny"], "experiment has no 'aurora-tinny'; did you mean aurora-tiny"),
        (["experiment=aurora-tiny", "trainer.max_step=3"], "no 'trainer.max_step'; did you mean trainer.max_steps"),
        (["experiment=aurora-tiny", "optimiser.lr=3"], "no 'optimiser.lr'; did you mean optimizer.lr"),
        (["experiment=aurora-tiny", "trainer.max_steps=many"], "trainer.max_steps must be int, got 'many'"),
        (["experiment=aurora-tiny", "optimizer.lr=fast"], "optimizer.lr"),
        (["experiment=aurora-tiny", "seed=x"], "seed must be an integer, such as 0, got 'x'"),
        (["experiment=aurora-tiny", "tokenizer.codebook_size=x"], "codebook_size must be of type int"),
        (["experiment=aurora-tiny", "tokenizer=aurora-tin"], "did you mean aurora-tiny"),
        (["experiment=aurora-tiny", "module.loss=msee"], "did you mean mse"),
        (["experiment=aurora-tiny", "trainer.precision=7"], "7"),
        (["experiment=aurora-tiny", "resume=true"], "does not exist"),
        ([], "experiment=NAME"),
        (["experiment=aurora-tiny", "trainer.max_steps"], "trainer.max_steps"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, capfd, overrides, complaint):
    from zoo.commands.train import main

    assert main([*overrides, f"output_dir={tmp_path}"]) == 2
    error = capfd.readouterr().err.strip()
    assert complaint in error
    assert "Traceback" not in error
    assert len(error.splitlines()) == 1, error


def test_an_earlier_run_is_not_overwritten(tmp_path, capfd):
    from zoo.commands.train import main

    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.ckpt").touch()
    assert main(["experiment=aurora-tiny", f"output_dir={tmp_path}"]) == 2
    assert "add resume=true" in capfd.readouterr().err


@pytest.mark.parametrize("experiment", sorted(path.stem for path in (ROOT / "conf/experiment").glob("*.yaml")))
def test_every_experiment_composes(experiment):
    cfg = cli.compose("train", [f"experiment={experiment}"])
    assert cfg.module._target_.startswith("zoo.")
    first = (ROOT / f"conf/experiment/{experiment}.yaml").read_text().splitlines()[1]
    assert "published recipe" in first.lower() or "zoo's own" in first


@pytest.mark.parametrize("command", ["list", "info aurora-tiny", "info aurora-depth", "--help"])
def test_the_zoo_tells_about_itself_from_any_folder(tmp_path, command):
    done = subprocess.run(
        [sys.executable, "-m", "zoo", *command.split()], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "aurora" in done.stdout or "usage" in done.stdout


@pytest.mark.parametrize(
    ("command", "complaint"), [("trian", "did you mean train"), ("info nothing", "no tokenizer is called 'nothing'")]
)
def test_wrong_commands_are_one_line_and_exit_code_2(command, complaint):
    done = subprocess.run([sys.executable, "-m", "zoo", *command.split()], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("experiment", ["karl-finetune-tiny", "mingtok-tiny-2", "mingtok-tiny-3"])
def test_a_later_stage_does_not_start_without_the_weights_of_the_one_before(tmp_path, experiment):
    from zoo.commands.train import train

    with pytest.raises(zoo.ZooError, match="goes on from an earlier one; add weights="):
        train(cli.compose("train", [f"experiment={experiment}", f"output_dir={tmp_path}/run"]))

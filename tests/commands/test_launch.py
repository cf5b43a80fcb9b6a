"""The commands on several nodes, as far as one machine can be several: torchrun is a true one, SLURM is played."""

import csv
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from launch_helpers import Ranks, told_by_lightning, told_by_slurm, told_by_torchrun, torchrun
from PIL import Image
from safetensors.torch import load_file

import zoo
from zoo import registry
from zoo.commands import evaluate, generate, pretokenize, train
from zoo.data import Loader

IMAGES, BATCH = 22, 3
SIZES = {"grid": 4, "width": 32, "encoder_depth": 1, "decoder_depth": 1, "encoder_heads": 2, "decoder_heads": 2}
TRAIN = [
    *("experiment=aurora-tiny", "tokenizer.hidden_dim=4", "tokenizer.codebook_dim=8", "tokenizer.codebook_size=16"),
    *("data.num_workers=0", "trainer.max_steps=6", "trainer.log_every_n_steps=1", "callbacks.progress=null"),
    *("callbacks.pictures=null", "callbacks.best=null", "resume=auto"),
]
MAINS = {"train": train.main, "evaluate": evaluate.main, "generate": generate.main, "pretokenize": pretokenize.main}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """By name the commands that are compared, without devices and output_dir, on a few pictures and tiny networks."""
    root = tmp_path_factory.mktemp("launch")
    (root / "pictures").mkdir()
    draw = np.random.default_rng(0)
    for i in range(IMAGES):
        pixels = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 32), Image.BICUBIC).save(root / f"pictures/{i:02d}.png")
    torch.manual_seed(0)
    registry.save(zoo.create_generator("xar-tiny", entity_size=2, **SIZES), root / "generator.safetensors")
    zoo.save_tokenizer(zoo.create_tokenizer("kl-tiny", image_size=32), root / "kl.safetensors")
    folder = ["data=folder", f"data.path={root}/pictures", "data.image_size=32", "data.num_workers=0"]
    few = ["device=cpu", f"batch_size={BATCH}"]
    scenes = ["data.num_workers=0", "encoder=siglip-tiny", "limit=22"]
    generator = [f"weights={root}/generator.safetensors", f"tokenizer_weights={root}/kl.safetensors", "num_steps=2"]
    return {
        "reconstruction": ["evaluate", *few, *folder, "tokenizer=vqgan-tiny", "pictures=4", "save_every=0"],
        "zeroshot": ["evaluate", *few, *scenes, "task=zeroshot", "pictures=2", "save_every=0"],
        "probe": ["evaluate", *few, *scenes, "task=probe", "save_every=0"],
        "generation": ["generate", *few, *generator, "num_images=10"],
        "latents": ["pretokenize", *few, *folder, "tokenizer=kl-tiny", "num_shards=5"],
        "ids": ["pretokenize", *few, *folder, "tokenizer=vqgan-tiny", "num_shards=5"],
    }


@pytest.fixture(scope="module")
def one(jobs, tmp_path_factory):
    """The folder of what one process makes of a job."""
    root = tmp_path_factory.mktemp("one")

    def run(name):
        if not (root / name).exists():
            command, *arguments = jobs[name]
            assert MAINS[command]([*arguments, f"output_dir={root / name}"]) == 0
        return root / name

    return run


@pytest.fixture(scope="module")
def two_nodes(jobs, tmp_path_factory):
    """The folders of what two nodes of two processes, started by torchrun, make of all jobs and of a training."""
    root = tmp_path_factory.mktemp("nodes")
    training = ["train", *TRAIN, "data.batch_size=2", "trainer.devices=2", "trainer.num_nodes=2"]
    all_jobs = [[*job, "devices=2", "num_nodes=2", f"output_dir={root / name}"] for name, job in jobs.items()]
    printed = torchrun(root, [[*training, f"output_dir={root}/training"], *all_jobs])
    assert printed.count("trained 6 steps") == 1
    assert printed.count("metrics.json and pictures are in") == 1  # the first rank speaks for all
    return root


def known(row):
    """The numbers of a row that no clock has measured, and that are not of the process."""
    own = ("encode_per_second", "decode_per_second", "peak_process_memory")
    return {name: value for name, value in row["metrics"].items() if value is not None and name not in own}


def assert_same_results(one, other):
    """Of a job, whatever it writes."""
    names = {path.relative_to(one) for path in one.rglob("*") if path.is_file()}
    assert {path.relative_to(other) for path in other.rglob("*") if path.is_file()} == names
    for name in names:
        if name.suffix == ".png":
            # the rows of a batch may be rounded by their neighbours
            pixels, expected = (np.asarray(Image.open(folder / name)).astype(int) for folder in (other, one))
            assert np.abs(pixels - expected).max() <= 1, name
        if name.suffix == ".tar":
            assert (other / name).read_bytes() == (one / name).read_bytes(), name
    if Path("metrics.json") in names:
        expected, got = (json.loads((folder / "metrics.json").read_text()) for folder in (one, other))
        assert got["protocol"] == expected["protocol"]
        assert got["protocol"]["images"] == IMAGES
        for row, mine in zip(got["rows"], expected["rows"], strict=True):
            assert row["missing"] == mine["missing"]
            assert known(row) == pytest.approx(known(mine), rel=1e-5, abs=1e-5)
            assert row["metrics"].get("images", IMAGES) == IMAGES
    if Path("manifest.json") in names:
        expected, got = (json.loads((folder / "manifest.json").read_text()) for folder in (one, other))
        assert got["shards"] == expected["shards"]
        assert got["samples"] == IMAGES


@pytest.mark.parametrize("name", ["reconstruction", "zeroshot", "probe", "generation", "latents", "ids"])
def test_two_nodes_of_two_ranks_give_what_one_process_gives(one, two_nodes, name):
    assert_same_results(one(name), two_nodes / name)


def weights(folder):
    return load_file(folder / "tokenizer.safetensors")


def steps(folder):
    with (folder / "metrics.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]


def test_every_launcher_trains_the_same_weights_also_when_slurm_ends_the_job_once(two_nodes, tmp_path):
    def run(name, told, *arguments):
        return Ranks(tmp_path / f"{name}.txt", told, "train", *TRAIN, *arguments, f"output_dir={tmp_path / name}")

    nodes = ["trainer.devices=2", "trainer.num_nodes=2", "data.batch_size=2"]
    end = f"{{_target_: launch_helpers.Signalled, rank: 3, step: 2, number: {signal.SIGUSR1:d}}}"
    ended = run("slurm", told_by_slurm(2, 2), *nodes, f"+callbacks.end={end}")
    assert ended.codes() == [128 + signal.SIGTERM] * 4, ended.log.read_text()
    assert ended.log.read_text().count("ended by a signal after 3 steps") == 1
    assert torch.load(tmp_path / "slurm/checkpoints/last.ckpt", weights_only=True)["global_step"] == 3
    assert not list(tmp_path.rglob("hpc_ckpt*"))  # that of Lightning, written in the middle of a step

    run("slurm", told_by_slurm(2, 2), *nodes).succeed()
    run("lightning", told_by_lightning(4), "trainer.devices=4", "data.batch_size=2").succeed()
    assert train.main([*TRAIN, "data.batch_size=8", f"output_dir={tmp_path}/alone"]) == 0
    expected = weights(two_nodes / "training")
    for name in ("slurm", "lightning", "alone"):
        assert steps(tmp_path / name) == list(range(6))
        for key, tensor in weights(tmp_path / name).items():
            tolerance = {"rtol": 1e-3, "atol": 1e-4} if name == "alone" else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(tensor, expected[key], **tolerance, msg=lambda m, k=key, n=name: f"{n} {k}: {m}")


@pytest.mark.parametrize(
    ("name", "suffix", "ranks"),
    [("reconstruction", ".pt", 3), ("probe", ".pt", 1), ("generation", ".png", 3), ("latents", ".tar", 1)],
)
def test_killed_with_two_ranks_a_job_goes_on_with_another_number(jobs, one, tmp_path, name, suffix, ranks):
    command, *arguments = jobs[name]
    arguments.append(f"output_dir={tmp_path}/out")
    killed = Ranks(
        tmp_path / "killed.txt", told_by_torchrun(2), command, *arguments, "devices=2",
        deadly=[(suffix, 2), (suffix, 1)],
    )  # fmt: skip
    assert killed.codes() == [-9, -9], killed.log.read_text()
    kept = {path: path.stat() for path in (tmp_path / "out").rglob(f"*{suffix}") if not path.name.startswith(".")}
    assert kept
    if ranks == 1:
        assert MAINS[command](arguments) == 0
    else:
        again = Ranks(tmp_path / "again.txt", told_by_torchrun(ranks), command, *arguments, f"devices={ranks}")
        again.succeed()
    for path, before in kept.items():
        if suffix != ".pt":  # what was whole was left as it was
            assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert_same_results(one(name), tmp_path / "out")


def test_what_was_measured_is_not_measured_again_and_not_mixed_with_another_protocol(
    jobs, one, tmp_path, capfd, monkeypatch
):
    _, *arguments = jobs["reconstruction"]
    arguments.append(f"output_dir={tmp_path}/out")
    assert Ranks(tmp_path / "log.txt", [{}], "evaluate", *arguments, deadly=[(".pt", 2)]).codes() == [-9]
    assert evaluate.main([*arguments, "dtype=bfloat16"]) == 2
    assert "out/progress was begun with another dtype" in capfd.readouterr().err
    choose, chosen = Loader.choose, []
    monkeypatch.setattr(Loader, "choose", lambda self, numbers: chosen.append([*numbers]) or choose(self, numbers))
    assert evaluate.main(arguments) == 0
    assert chosen == [list(range(2, -(-IMAGES // BATCH))), [0]]  # the last for the picture
    assert_same_results(one("reconstruction"), tmp_path / "out")


@pytest.mark.parametrize(
    ("told", "command", "arguments", "complaint"),
    [
        (told_by_torchrun(4)[0], "evaluate", ["devices=2"], "torchrun started 4 processes, which devices=2 on each of"),
        (
            told_by_torchrun(4)[3],
            "train",
            TRAIN,
            "torchrun started 4 processes, which devices=1 on each",
        ),
        (told_by_slurm(2, 2)[0], "generate", ["devices=4"], "--ntasks-per-node=2` does not match"),
        (told_by_slurm(2, 2)[0], "train", ["output_dir=null"], "SLURM started 4 processes, which share a folder"),
        ({"SLURM_NTASKS": "4"}, "evaluate", ["devices=4"], "say --ntasks-per-node instead"),
        ({}, "train", [*TRAIN, "resume=perhaps"], "resume must be true, false or auto, got 'perhaps'"),
    ],
)
def test_a_launcher_that_disagrees_is_one_line(tmp_path, capfd, monkeypatch, told, command, arguments, complaint):
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    output = [] if "output_dir=null" in arguments else [f"output_dir={tmp_path}/out"]
    arguments = [one for one in arguments if one != "output_dir=null"]
    device = [] if command == "train" else ["device=cpu"]
    assert MAINS[command]([*device, *arguments, *output]) == 2
    error = capfd.readouterr().err.strip()
    assert complaint in error
    assert len(error.splitlines()) == 1, error

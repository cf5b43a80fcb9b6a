"""Commands of the zoo in the processes of a launcher: started by torchrun, or forked and told what launchers tell."""

import importlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import lightning as L

ROOT = Path(__file__).parents[2]
COMMANDS = ("train", "evaluate", "generate", "pretokenize")
PARTS = sorted(
    path for name in ("tokenizer", "encoder", "generator") for path in ROOT.glob(f"zoo/tokenizers/*/{name}.py")
)
PRELOAD = [
    *("launch_helpers", "pytest", "zoo.tokenizers.aurora.training", "zoo.training.checkpoints"),
    *(f"zoo.commands.{name}" for name in COMMANDS),
    *(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in PARTS),
]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def torchrun(folder: Path, jobs: list[list[str]], seconds: float = 900) -> str:
    """Run commands, one after the other, on two "nodes" of two processes each; returns what all of them printed."""
    (folder / "jobs.json").write_text(json.dumps([[free_port(), *job] for job in jobs]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    meeting = ["--nnodes=2", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    start = [sys.executable, "-m", "torch.distributed.run", *meeting]
    log, nodes = folder / "log.txt", []
    for rank in (0, 1):
        command = [*start, f"--node-rank={rank}", __file__, "jobs.json"]
        with log.open("a") as output:
            nodes.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output))
    end = time.monotonic() + seconds
    while any(node.poll() is None for node in nodes):
        if time.monotonic() > end or any(node.poll() for node in nodes):  # the other one would wait for it
            for node in nodes:
                node.terminate()  # which ends the processes that it started
            break
        time.sleep(0.1)
    assert [node.wait() for node in nodes] == [0, 0], log.read_text()
    return log.read_text()


def run_jobs(path: str) -> None:
    """In each process that torchrun starts: one start of it is good for several groups of ranks.

    The first meets in the store of torchrun's agent, as always, and each later one at another port.
    """
    for number, (port, command, *arguments) in enumerate(json.loads(Path(path).read_text())):
        if number:
            os.environ["MASTER_PORT"] = str(port)
            os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
        code = importlib.import_module(f"zoo.commands.{command}").main(arguments)
        if code:
            sys.exit(code)


class Signalled(L.Callback):
    """Sends its process a signal in a step, if it is the rank that is meant."""

    def __init__(self, rank: int, step: int, number: int):
        self.rank, self.step, self.number = rank, step, number

    def on_train_batch_start(self, trainer, *args):
        if (trainer.global_rank, trainer.global_step) == (self.rank, self.step):
            os.kill(os.getpid(), self.number)


def told_by_torchrun(ranks: int) -> list[dict[str, str]]:
    shared = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": str(ranks), "GROUP_RANK": "0"}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def told_by_slurm(nodes: int, ranks: int) -> list[dict[str, str]]:
    """What srun tells the tasks of a job on some nodes with so many ranks each."""
    shared = {
        **{"SLURM_JOB_ID": "1234", "SLURM_JOB_NAME": "zoo", "SLURM_NODELIST": "localhost"},
        **{"SLURM_NNODES": str(nodes), "SLURM_NTASKS": str(nodes * ranks), "SLURM_NTASKS_PER_NODE": str(ranks)},
    }
    places = [(node, rank) for node in range(nodes) for rank in range(ranks)]
    return [
        shared | {"SLURM_PROCID": str(i), "SLURM_NODEID": str(node), "SLURM_LOCALID": str(rank)}
        for i, (node, rank) in enumerate(places)
    ]


def told_by_lightning(ranks: int) -> list[dict[str, str]]:
    return [{"NODE_RANK": "0", "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)} for rank in range(ranks)]


def work(command: str, arguments: list[str], told: dict[str, str], log: str, deadly: tuple[str, int] | None) -> None:
    os.environ.update(told)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if deadly:
        die_after(*deadly)
    sys.exit(importlib.import_module(f"zoo.commands.{command}").main(arguments))


def die_after(suffix: str, count: int) -> None:
    """Kill this process when that many files of a kind are whole and the next one is half written."""
    replace, left = os.replace, count

    def deadly_replace(source, target):
        nonlocal left
        if str(target).endswith(suffix):
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
        replace(source, target)

    os.replace = deadly_replace


class Ranks:
    """The processes of one command, forked from one that has imported everything."""

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)

    def __init__(self, log: Path, told: list[dict[str, str]], command: str, *arguments: str, deadly=()):
        """told: environment variables of each rank. deadly: of each rank, `die_after` or None."""
        self.log, self.processes = log, []
        meeting = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for rank, own in enumerate(told):
            kill = deadly[rank] if deadly else None
            process = self.context.Process(target=work, args=(command, list(arguments), meeting | own, str(log), kill))
            process.start()
            self.processes.append(process)

    def codes(self, seconds: float = 300) -> list[int]:
        """Their exit codes, when all have ended by themselves."""
        for process in self.processes:
            process.join(seconds)
        hanging = [process for process in self.processes if process.exitcode is None]
        for process in hanging:
            process.kill()
        assert not hanging, f"a process hangs: {self.log.read_text()}"
        return [process.exitcode for process in self.processes]

    def succeed(self) -> None:
        assert not any(self.codes()), self.log.read_text()


if __name__ == "__main__":
    run_jobs(sys.argv[1])

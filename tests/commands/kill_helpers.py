"""Trainings in processes that are forked from one which has imported everything, so that each costs a second."""

import copy
import multiprocessing
import os
import resource
import signal
import socket
from pathlib import Path

import lightning as L
from omegaconf import open_dict

# what every forked process finds imported
PRELOAD = ["kill_helpers", "pytest", "zoo.commands.train", "zoo.tokenizers.aurora.training", "zoo.data.render"]


class Begun(L.Callback):
    """Makes a file at the first step."""

    def __init__(self, path: str):
        self.path = path

    def on_train_batch_start(self, *args):
        open(self.path, "w").close()


class FullDisk(L.Callback):
    """After some steps no file may grow beyond so many bytes any more."""

    def __init__(self, after: int, size: int):
        self.after, self.size = after, size

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.after:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


class Fails(L.Callback):
    """Raises an error when a hook is called at a step."""

    def __init__(self, hook: str, step: int):
        self.step = step
        setattr(self, hook, self.fail)

    def fail(self, trainer, *args):
        if trainer.global_step == self.step:
            raise RuntimeError("failed")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_while_writing(name: str, number: int, moment: str) -> None:
    """Kill this process at the file `name` when it is written for that time: its first half is there ("write"), all of
    it but not synced, synced and not renamed, or just renamed."""
    import zoo.files

    opened, sync, replace, count = Path.open, os.fsync, os.replace, 0

    def counting_open(path, *args, **options):
        nonlocal count
        file = opened(path, *args, **options)
        if path.name == f".{name}.part":
            count += 1
            if count == number and moment == "write":
                write = file.write
                file.write = lambda data: (write(memoryview(data)[: len(data) // 2]), file.flush(), die())
        return file

    def deadly_fsync(fd):
        if count == number and moment == "fsync" and os.readlink(f"/proc/self/fd/{fd}").endswith(f".{name}.part"):
            die()
        sync(fd)

    def deadly_replace(source, target):
        mine = count == number and os.path.basename(target) == name
        if mine and moment == "replace":
            die()
        replace(source, target)
        if mine and moment == "replaced":
            die()

    zoo.files.Path.open, os.fsync, os.replace = counting_open, deadly_fsync, deadly_replace


def train(cfg, output: str, environment: dict[str, str], kill: tuple | None) -> None:
    """A training in this process, what it says into a file."""
    from zoo.commands.train import train as run
    from zoo.distributed import leave

    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if kill:
        kill_while_writing(*kill)
    try:
        run(cfg)
    finally:
        leave()


class Trainings:
    """Of one composed configuration, as composing takes longer than these trainings."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)

    def start(self, folder, *, ranks: int = 1, kill: tuple | None = None, **callbacks) -> list:
        """The processes of a training, one a rank, which goes on if there is a checkpoint. kill: of its first rank, see
        kill_while_writing. callbacks: more of them, by name."""
        cfg, processes, environment = copy.deepcopy(self.cfg), [], {"OMP_NUM_THREADS": "1"}
        cfg.output_dir, cfg.trainer.devices = str(folder), ranks
        cfg.resume = (folder / "checkpoints/last.ckpt").exists()
        with open_dict(cfg):
            cfg.callbacks.update({name: {"_target_": f"kill_helpers.{name}", **of} for name, of in callbacks.items()})
        if ranks > 1:  # what torchrun and Lightning tell the ranks
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
        for rank in range(ranks):
            own = {"NODE_RANK": "0", "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            arguments = cfg, f"{folder}-{rank}.txt", environment | own, kill if rank == 0 else None
            processes.append(self.context.Process(target=train, args=arguments))
            processes[-1].start()
        return processes

    def finish(self, processes: list, seconds: float = 60) -> list[int]:
        """Their exit codes. A rank that waits for a dead one must give up by itself."""
        for process in processes:
            process.join(seconds)
        hanging = [process for process in processes if process.exitcode is None]
        for process in hanging:
            process.kill()
        assert not hanging, "a process hangs"
        return [process.exitcode for process in processes]

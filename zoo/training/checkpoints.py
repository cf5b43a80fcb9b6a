"""Checkpoints that a kill, a full disk or a failing power supply cannot spoil."""

from __future__ import annotations

import signal

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from zoo.files import writing
from zoo.training.sharding import ShardedStrategy


class WholeCheckpoints(TorchCheckpointIO):
    """Writes checkpoints by `zoo.files.writing`: one that is there is whole, and the one before stays until then.

    Lightning's own goes through a temporary file in another folder, often of another disk, from where it is copied.
    Those of one device, of DDP and of sharded training all come through here.
    """

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        """Raises ZooError when the disk is full."""
        if storage_options is not None:
            raise TypeError(f"a file on a disk has no storage_options, got {storage_options!r}")
        with writing(path) as file:
            torch.save(checkpoint, file)


class ResumePoint(ModelCheckpoint):
    """A ModelCheckpoint that ends a run when asked, and whose save_on_exception saves between two steps only.

    SIGTERM and SIGUSR1, which SLURM sends before it kills, to whichever of the ranks and whenever, end the run on all
    of them behind the same step. Lightning's own handlers would talk to the other ranks in the middle of theirs.

    An error in the middle of a step, another rank's death or Ctrl-C may have changed some weights and buffers and not
    the others, and during validation an average may stand in the place of the weights: no run passes through such a
    state between its steps. Then the earlier checkpoint is what the run goes on from.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.between_steps, self.asked_to_end = True, False

    def on_train_start(self, trainer, module) -> None:
        super().on_train_start(trainer, module)
        for number in (signal.SIGTERM, signal.SIGUSR1):  # Lightning puts the earlier handlers back
            signal.signal(number, self._ask_to_end)

    def _ask_to_end(self, *args) -> None:
        self.asked_to_end = True

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.between_steps = False

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.between_steps = module.completes_step(batch_idx)
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        if self.between_steps and trainer.strategy.reduce_boolean_decision(self.asked_to_end, all=False):
            raise SIGTERMException

    def on_exception(self, trainer, module, exception) -> None:
        # ranks that hold parts of the weights save together: after SIGTERM, which reaches all, and after nothing else
        together = isinstance(exception, SIGTERMException) or not isinstance(trainer.strategy, ShardedStrategy)
        if self.between_steps and together and not trainer.validating:
            super().on_exception(trainer, module, exception)

"""Checkpoints that a kill, a full disk or a failing power supply cannot spoil."""

from __future__ import annotations

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
    """A ModelCheckpoint whose save_on_exception saves between two steps only.

    An error in the middle of a step, another rank's death or Ctrl-C may have changed some weights and buffers and not
    the others, and during validation an average may stand in the place of the weights: no run passes through such a
    state between its steps. Then the earlier checkpoint is what the run goes on from.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.between_steps = True

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.between_steps = False

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.between_steps = module.completes_step(batch_idx)
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    def on_exception(self, trainer, module, exception) -> None:
        # ranks that hold parts of the weights save together: after SIGTERM, which reaches all, and after nothing else
        together = isinstance(exception, SIGTERMException) or not isinstance(trainer.strategy, ShardedStrategy)
        if self.between_steps and together and not trainer.validating:
            super().on_exception(trainer, module, exception)

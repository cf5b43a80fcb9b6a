"""What happens beside the training loop: pictures, an average of weights, a metrics.csv that survives a resume."""

from __future__ import annotations

import csv
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torchvision.utils import make_grid, save_image

from zoo.training.module import batch_size


class ValidationPictures(L.Callback):
    """Writes what the module shows of the first validation batch to folder/step-N.png, num_images in a row."""

    def __init__(self, folder: str, num_images: int = 8):
        self.folder, self.num_images = Path(folder), num_images

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if batch_idx or trainer.sanity_checking or not trainer.is_global_zero:
            return
        count = min(self.num_images, batch_size(batch))
        grid = make_grid(module.pictures(batch, count), nrow=count)
        self.folder.mkdir(parents=True, exist_ok=True)
        save_image(grid, self.folder / f"step-{trainer.global_step:07d}.png")


class EpochWeightAveraging(EMAWeightAveraging):
    """An exponential moving average of weights that starts anew from the current weights at each epoch."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if batch_idx == 0:
            self._average_model.module.load_state_dict(module.state_dict())


class ResumingCSVLogger(CSVLogger):
    """Lightning's CSV logger, which deletes the metrics of a run when the run is resumed, without the deleting.

    Rows at or after the step from which the run goes on are dropped, since they are written again.
    """

    def __init__(self, save_dir: str, flush_logs_every_n_steps: int = 100):
        super().__init__(save_dir, name="", version="", flush_logs_every_n_steps=flush_logs_every_n_steps)
        path = Path(save_dir) / "metrics.csv"
        self._earlier = list(csv.DictReader(path.open(newline=""))) if path.is_file() else []

    def continue_from(self, step: int, last: dict[str, float] | None = None) -> None:
        """Keep the rows of earlier runs up to a step; without this call a run starts an empty file.

        last: what was logged at the step before, to be added where the earlier run was killed too soon to write it.
        """
        writer = self.experiment
        kept = [row for row in self._earlier if int(row["step"]) < step]
        for row in kept:
            writer.log_metrics({k: float(v) for k, v in row.items() if v and k != "step"}, int(row["step"]))
        if last and not any(int(row["step"]) == step - 1 and all(map(row.get, last)) for row in kept):
            writer.log_metrics(last, step - 1)
        self.save()

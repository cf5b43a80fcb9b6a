"""What happens beside the training loop: pictures, an average of weights, a metrics.csv that survives a resume."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from torchvision.utils import make_grid, save_image

from zoo.files import room_for, writing
from zoo.training.module import batch_size


class ValidationPictures(L.Callback):
    """Writes what the module shows of the first validation batch to folder/step-N.png, num_images in a row."""

    def __init__(self, folder: str, num_images: int = 8):
        self.folder, self.num_images = Path(folder), num_images

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if batch_idx or trainer.sanity_checking:
            return
        count = min(self.num_images, batch_size(batch))
        pictures = module.pictures(batch, count)  # on every rank, since weights may be divided among them
        if not trainer.is_global_zero:
            return
        grid = make_grid(pictures, nrow=count)
        with writing(self.folder / f"step-{trainer.global_step:07d}.png") as file:
            save_image(grid, file, "png")


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
        self._path = Path(save_dir) / "metrics.csv"

    def continue_from(self, step: int, last: dict[str, float] | None = None) -> None:
        """Keep the rows of earlier runs up to a step; without this call a run starts an empty file.

        last: what was logged at the step before, to be added where the earlier run was killed too soon to write it.
        """
        kept = [row for row in read_rows(self._path) if int(row["step"]) < step]
        if last and not any(int(row["step"]) == step - 1 and all(map(row.get, last)) for row in kept):
            kept.append(last | {"step": step - 1})
        names = sorted({name for row in kept for name in row})
        write_rows(self._path, names, kept)
        self._experiment = _Appending(self.log_dir)
        self._experiment.metrics_keys = names


class _Appending(ExperimentWriter):
    """Goes on with the file that is there; with a new column, writes it anew without a moment in which it is short."""

    def _check_log_dir_exists(self) -> None:
        """Deletes nothing."""

    def save(self) -> None:
        with room_for(self.metrics_file_path):
            super().save()

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        write_rows(self.metrics_file_path, fieldnames, read_rows(self.metrics_file_path))


def read_rows(path: str | Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv; the one that a killed run had not written to its end is left out."""
    path = Path(path)
    whole = path.read_bytes().rpartition(b"\n")[0] if path.is_file() else b""
    return list(csv.DictReader(whole.decode().splitlines()))


def write_rows(path: str | Path, names: list[str], rows: list[dict]) -> None:
    with writing(path) as file:
        text = io.TextIOWrapper(file, newline="")
        table = csv.DictWriter(text, names)
        table.writeheader()
        table.writerows(rows)
        text.detach()  # flushed, and left open for `writing`

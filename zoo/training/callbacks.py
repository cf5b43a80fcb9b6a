"""What happens beside the training loop: pictures, an average of weights, the health of codebooks, a metrics.csv that
survives a resume."""

from __future__ import annotations

import csv
import io
from functools import partial
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from torch import Tensor, nn
from torchvision.utils import make_grid, save_image

from zoo.errors import ZooError
from zoo.files import room_for, writing
from zoo.quantizers import perplexity
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


class CodebookHealth(L.Callback):
    """Logs how evenly training uses the codes of each stream, and says when a codebook has collapsed.

    Ids are those of all training batches of all ranks since the last report, with whose metrics they are logged, in the
    names of evaluation: train/perplexity/STREAM (exp of the entropy, 1 to K) and train/codebook_use/STREAM (share of
    the K codes that occur); where a position has several levels, also of each as .../STREAM/LEVEL, counted from 0.
    Reports go on with the ids of the one before until there are enough of them: a few images cannot use all codes. A
    codebook (one that all levels share, or that of a level) whose perplexity is then below a share of K has collapsed,
    which is printed once until it has recovered. train/collapsed_codebooks is their number.

    Args:
        collapsed_below: that share, from 0 (never) to 1.
        ids_per_code: so many times K ids are enough.

    Raises:
        ZooError: another share, or fewer than one id a code.
    """

    def __init__(self, collapsed_below: float = 0.05, ids_per_code: int = 10):
        if not 0 <= collapsed_below <= 1:
            raise ZooError(f"collapsed_below must be a share of the codes from 0 to 1, got {collapsed_below}.")
        if ids_per_code < 1:
            raise ZooError(f"ids_per_code must be at least 1, got {ids_per_code}.")
        self.collapsed_below, self.ids_per_code = collapsed_below, ids_per_code
        self._sizes: dict[str, tuple[int, ...]] = {}  # of each stream, the number of codes of its codebooks
        self._counts: dict[str, Tensor] = {}  # (levels, K) int64, over all ranks
        self._collapsed: set[tuple[str, int]] = set()
        self._hooks = []

    def setup(self, trainer, module, stage: str) -> None:
        if stage != "fit" or module.tokenizer is None:
            return
        streams = module.tokenizer.info.streams
        for name, part in module.tokenizer.named_modules():
            if hasattr(part, "codebook_sizes"):
                stream = streams[0] if len(streams) == 1 else name.rpartition(".")[2]
                self._hooks.append(part.register_forward_hook(partial(self._count, stream)))

    def teardown(self, trainer, module, stage: str) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @torch.no_grad()
    def _count(self, stream: str, quantizer: nn.Module, inputs, output) -> None:
        if not quantizer.training:
            return
        counts = torch.atleast_2d(output.counts).long()
        self._sizes[stream] = quantizer.codebook_sizes
        self._counts[stream] = counts + self._counts[stream].to(counts.device) if stream in self._counts else counts

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        if batches % trainer.log_every_n_steps or not self._sizes:
            return
        logs = {}
        for stream, sizes in self._sizes.items():
            counts = self._counts[stream]
            whole = counts.sum(0)
            logs |= {f"perplexity/{stream}": perplexity(whole), f"codebook_use/{stream}": used(whole, max(sizes))}
            books = list(zip(counts if len(sizes) > 1 else [whole], sizes, strict=True))
            for level, count in enumerate(counts) if len(counts) > 1 else ():
                share = used(count, sizes[level % len(sizes)])
                logs |= {f"perplexity/{stream}/{level}": perplexity(count), f"codebook_use/{stream}/{level}": share}
            found = torch.stack([torch.stack([count.sum(), perplexity(count), used(count, k)]) for count, k in books])
            if found[0, 0] >= self.ids_per_code * max(sizes):
                self._judge(trainer, module, stream, found.tolist())
                self._counts[stream] = torch.zeros_like(counts)
        module.log_row(logs | {"collapsed_codebooks": float(len(self._collapsed))}, batch_size(batch))

    def _judge(self, trainer, module, stream: str, found: list[list[float]]) -> None:
        """found: of each codebook the number of ids, their perplexity and the share of codes that they use."""
        for level, (size, (number, evenness, share)) in enumerate(zip(self._sizes[stream], found, strict=True)):
            limit, one = self.collapsed_below * size, (stream, level)
            named = f"the codebook '{stream}'" + (f", level {level}," if len(found) > 1 else "")
            if evenness >= limit:
                if one in self._collapsed:
                    module.print(f"step {trainer.global_step}: {named} has recovered, perplexity {evenness:.1f}.")
                self._collapsed.discard(one)
            elif one not in self._collapsed:
                self._collapsed.add(one)
                module.print(
                    f"step {trainer.global_step}: {named} has collapsed: the last {number:.0f} ids have a perplexity "
                    f"of {evenness:.1f}, below {limit:.1f} ({self.collapsed_below:g} of {size} codes), and use "
                    f"{share:.1%} of the codes. If it does not recover, lower optimizer.lr, make codes running means "
                    "that restart where they are not used (of the tokenizer: ema_decay, restart_below, restart), or "
                    "weigh the losses of the quantizer otherwise."
                )

    def state_dict(self) -> dict:
        counts = {stream: counts.cpu() for stream, counts in self._counts.items()}
        return {"counts": counts, "collapsed": sorted(self._collapsed)}

    def load_state_dict(self, state: dict) -> None:
        self._counts = dict(state["counts"])
        self._collapsed = set(state["collapsed"])


def used(counts: Tensor, num_codes: int) -> Tensor:
    """Share of the codes that occur, (K,) counts -> scalar."""
    return (counts > 0).sum() / num_codes


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

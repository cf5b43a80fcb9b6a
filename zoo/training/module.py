"""The one training loop of the zoo: every system is a TrainingModule that only says what its losses are."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.registry import save_tokenizer
from zoo.tokenizer import Tokenizer
from zoo.training.schedules import constant
from zoo.training.sharding import ShardedStrategy, split, total_norm

Losses = Iterator[tuple[str, Tensor, dict[str, Tensor]]]


class TrainingModule(L.LightningModule):
    """Optimisation that behaves alike in every system: optimizers, accumulation, clipping, schedules, bad steps.

    A system writes `losses`, a generator that yields (optimizer, loss, what to log) in the order in which its recipe
    steps. After each yield the loss is propagated into that optimizer's parameters only and the optimizer steps, so
    the code after a yield sees the updated weights: a discriminator and a generator sharing one forward pass are two
    yields. Random numbers of a step are a function of (seed, batch, rank), so that a resumed run is the same run; what
    all ranks have to draw alike comes from `shared_generator`.

    Args:
        tokenizer: what is trained, or what the trained part stands on; None where there is no tokenizer.
        optimizers: {name: partial torch optimizer waiting for its parameter groups}. A step of the run is a batch (or
            `accumulate` batches), whichever of them step on it.
        schedules: {name: function of zoo.training.schedules, its own arguments bound}; default: constant. They follow
            the steps of the run.
        gradient_clip: largest norm of an optimizer's gradient; 0: no clipping.
        accumulate: batches whose gradients make one step.
        max_bad_steps: a step whose gradient is not finite is skipped; more than this many in a row end the run.
        compile: torch.compile the forward of `compiled`.
        seed: of everything random in training steps.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        optimizers: Mapping[str, Callable],
        schedules: Mapping[str, Callable] | None = None,
        gradient_clip: float = 0.0,
        accumulate: int = 1,
        max_bad_steps: int = 10,
        compile: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.tokenizer = tokenizer
        self.recipe = {name: optimizer for name, optimizer in optimizers.items() if optimizer is not None}
        self.schedules = dict(schedules or {})
        self.gradient_clip, self.accumulate = gradient_clip, accumulate
        self.max_bad_steps, self.seed, self._compile = max_bad_steps, seed, compile
        self._unchecked: list[tuple[int, list[str], Tensor]] = []  # steps whose finiteness was not read yet
        self._bad_in_a_row = 0
        self._row: dict[str, Tensor | float] = {}  # what this batch logged
        self._images, self._since = 0, None  # since the throughput was last logged

    def losses(self, batch: dict) -> Losses:
        """Yield (name of the optimizer, loss, {name: scalar to log}) in the order of the steps."""
        raise NotImplementedError

    def optimized(self) -> dict[str, nn.Module]:
        """The module that each optimizer trains, as far as its parameters require gradients."""
        return {"tokenizer": self.tokenizer}

    def save(self, folder: Path) -> Path:
        """Write what was trained into a folder, for use by name; returns the file."""
        path = folder / "tokenizer.safetensors"
        save_tokenizer(self.tokenizer, path)
        return path

    def pictures(self, batch: dict, count: int) -> Tensor:
        """(rows * count, C, H, W) to look at in validation: first images, their reconstructions, and differences."""
        images = batch[self.tokenizer.info.input][:count]
        reconstructions = self.tokenizer.reconstruct(images).to(images.dtype)
        return torch.cat([images, reconstructions, (images - reconstructions).abs()])

    def compiled(self) -> list[nn.Module]:
        """Those parts that training calls."""
        return [self.tokenizer]

    def setup(self, stage: str) -> None:
        for module in self.compiled() if self._compile else ():
            module.compile()

    def configure_optimizers(self):
        modules = self.optimized()
        if modules.keys() != self.recipe.keys():
            raise ZooError(f"{type(self).__name__} trains {sorted(modules)}, got optimizers for {sorted(self.recipe)}.")
        self.recipe = {name: self.recipe[name] for name in modules}  # the order of self.optimizers()
        total, epoch = self._run_length()
        configured = []
        for name, module in modules.items():
            optimizer = self.recipe[name](parameter_groups(module))
            schedule = partial(self.schedules.get(name, constant), total=total, epoch=epoch)
            configured.append(
                {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)}
            )
        return configured

    def clipped(self, name: str, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """Those parameters of an optimizer whose gradients are measured and clipped."""
        return parameters

    def shared_generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """Random numbers of this batch that are the same on every rank."""
        state = np.random.SeedSequence([self.seed, self._batch_number]).generate_state(1)
        return torch.Generator(device).manual_seed(int(state[0]))

    def own_rows(self, rows: Tensor) -> Tensor:
        """This rank's part (B, ...) of what was drawn for the images of all ranks (world size * B, ...)."""
        return rows.tensor_split(self.trainer.world_size)[self.global_rank]

    @property
    def _batch_number(self) -> int:
        return self.trainer.fit_loop.epoch_loop.total_batch_idx

    def on_train_batch_start(self, batch, batch_idx):
        seeds = np.random.SeedSequence([self.seed, self._batch_number, self.global_rank]).generate_state(3)
        random.seed(int(seeds[0]))
        np.random.seed(seeds[1])
        torch.manual_seed(int(seeds[2]))

    def completes_step(self, batch_idx: int) -> bool:
        """Whether a step ends with this batch of the epoch, and no gradients are left for the next one."""
        return (batch_idx + 1) % self.accumulate == 0 or self.trainer.is_last_batch

    def training_step(self, batch: dict, batch_idx: int) -> None:
        completes = self.completes_step(batch_idx)
        optimizers = dict(zip(self.recipe, _as_list(self.optimizers()), strict=True))
        self._row = {}
        for i, (name, loss, logs) in enumerate(self.losses(batch)):
            optimizer = optimizers[name]
            with nullcontext() if completes else self._no_sync():
                self._propagate(loss / self.accumulate, optimizer)
            if completes:
                logs = logs | {f"lr/{name}": optimizer.param_groups[0]["lr"]}
                norm = self._step(name, optimizer, counts=i == 0)
                self._unchecked.append((self.global_step, batch.get("key", []), norm))
                logs[f"gradient_norm/{name}"] = norm
            logs = {f"train/{key}": value for key, value in logs.items()}
            self.log_dict(logs, batch_size=batch_size(batch))
            self._row |= logs
        if completes:
            for scheduler in _as_list(self.lr_schedulers()):
                scheduler.step()
        self._log_throughput(batch_size(batch))
        if self.device.type == "cpu" or len(self._unchecked) >= self.trainer.log_every_n_steps:
            self._check_bad_steps()

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """A batch is logged after the checkpoint behind it is written; a run killed in between has the row here."""
        checkpoint["train_row"] = {name: float(value) for name, value in self._row.items()}

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Mean squared error and PSNR (dB, mean over images) of reconstructions in [0, 1]."""
        images = batch[self.tokenizer.info.input]
        mse = (self.tokenizer.reconstruct(images) - images).square().flatten(1).mean(1)
        scores = {"val/mse": mse.mean(), "val/psnr": (-10 * mse.clamp(min=1e-10).log10()).mean()}
        self.log_dict(scores, batch_size=len(images), sync_dist=True, prog_bar=True)

    def on_validation_epoch_start(self) -> None:
        self._since = None  # validation is no part of the training's throughput

    def on_train_epoch_end(self) -> None:
        self._check_bad_steps()

    def _propagate(self, loss: Tensor, optimizer) -> None:
        """Add to the gradients of this optimizer's parameters alone."""
        optimizers = _as_list(self.optimizers())
        if len(optimizers) == 1:  # all gradients are its own; `inputs` costs DDP a search for unused parameters
            self.manual_backward(loss)
        elif not isinstance(self.trainer.strategy, ShardedStrategy):
            self.manual_backward(loss, inputs=_parameters(optimizer))
        else:  # what a loss depends on are not the divided parameters but the whole ones, made for the pass
            others = [p for other in optimizers if other is not optimizer for p in _parameters(other)]
            kept = [p.grad for p in others]
            for parameter in others:
                parameter.grad = None
            self.manual_backward(loss)
            for parameter, gradient in zip(others, kept, strict=True):
                parameter.grad = gradient

    def _step(self, name: str, optimizer, counts: bool) -> Tensor:
        """Clip and step without reading anything back from the device; returns the gradient's norm before clipping."""
        raw = optimizer.optimizer
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            scaler.unscale_(raw)
        parameters = self.clipped(name, _parameters(raw))
        norm = total_norm([p.grad for p in parameters if p.grad is not None])
        for part in split(parameters) if self.gradient_clip else ():
            torch.nn.utils.clip_grads_with_norm_(part, self.gradient_clip, norm)
        if scaler is None:
            bad = (~torch.isfinite(norm)).float()
            if getattr(raw, "_step_supports_amp_scaling", False):
                raw.grad_scale, raw.found_inf = None, bad  # a fused optimizer skips the step on the device
            elif bad:
                optimizer.zero_grad()
        # The first step of a batch counts as the step of the run.
        optimizer.step() if counts else self.trainer.strategy.optimizer_step(raw, closure=lambda: None)
        optimizer.zero_grad()
        return norm.detach()

    def _log_throughput(self, images: int) -> None:
        """Images a second over all ranks, since the last time that metrics were logged."""
        now = time.perf_counter()
        if self._since is None:
            self._images, self._since = 0, now
            return
        self._images += images * self.trainer.world_size
        if self.global_step % self.trainer.log_every_n_steps == 0:
            self.log("train/images_per_second", self._images / (now - self._since), batch_size=images)
            self._images, self._since = 0, now

    def _check_bad_steps(self) -> None:
        if not self._unchecked:
            return
        norms = torch.stack([norm for *_, norm in self._unchecked]).tolist()
        for (step, keys, _), norm in zip(self._unchecked, norms, strict=True):
            finite = np.isfinite(norm)
            self._bad_in_a_row = 0 if finite else self._bad_in_a_row + 1
            if not finite:
                names = ", ".join(keys[:4]) + (", ..." if len(keys) > 4 else "")
                self.print(f"step {step} was skipped: its gradient is {norm} (batch of {names or 'no named samples'}).")
            if self._bad_in_a_row > self.max_bad_steps:
                raise ZooError(
                    f"{self._bad_in_a_row} steps in a row had no finite gradient, the last on the batch of {names}; "
                    "look at these samples, or lower optimizer.lr."
                )
        self._unchecked.clear()

    def _no_sync(self):
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()

    def _run_length(self) -> tuple[int, int]:
        """Optimizer steps of the whole run (-1: no end) and of an epoch (-1: unknown)."""
        self.trainer.fit_loop.setup_data()
        batches = self.trainer.num_training_batches
        epoch = -1 if batches == float("inf") else -(-batches // self.accumulate)
        epochs = self.trainer.max_epochs
        bounds = [self.trainer.max_steps] if self.trainer.max_steps > 0 else []
        bounds += [epochs * epoch] if epochs and epochs > 0 and epoch > 0 else []
        return min(bounds, default=-1), epoch


def parameter_groups(module: nn.Module) -> list[dict]:
    """All parameters that require gradients: those of two axes and more decay as the optimizer says, others never."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    matrices, vectors = ([p for p in parameters if (p.ndim < 2) == few] for few in (False, True))
    groups = [{"params": part} for part in split(matrices)]
    return groups + [{"params": part, "weight_decay": 0.0} for part in split(vectors)]


def batch_size(batch: dict) -> int:
    """Number of samples of a batch."""
    return len(next(value for value in batch.values() if isinstance(value, Tensor)))


def _parameters(optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _as_list(value) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]

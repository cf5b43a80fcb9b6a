"""The one training loop of the zoo: every system is a TrainingModule that only says what its losses are."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn

from zoo.distributed import min_over_ranks
from zoo.errors import ZooError
from zoo.registry import save_tokenizer
from zoo.tokenizer import Tokenizer, Tokens
from zoo.training.schedules import constant
from zoo.training.sharding import ShardedStrategy, blocks, split, total_norm

Losses = Iterator[tuple[str, Tensor, dict[str, Tensor]]]


class TrainingModule(L.LightningModule):
    """Optimisation that behaves alike in every system: optimizers, accumulation, clipping, schedules, bad steps.

    A system writes `losses`, a generator that yields (optimizer, loss, what to log) in the order in which its recipe
    steps. After each yield the loss is propagated into that optimizer's parameters only and the optimizer steps, so
    the code after a yield sees the updated weights: a discriminator and a generator sharing one forward pass are two
    yields. Random numbers of a step are a function of (seed, batch, rank), so that a resumed run is the same run; what
    all ranks have to draw alike comes from `shared_generator`.

    A step whose loss or gradient is not finite, on whatever rank, is skipped on all of them: parameters, the state of
    the optimizer and buffers (codebooks that are running means, batch statistics) stay what they were. Such steps are
    named, and their number is logged as `train/skipped_steps`. In float16 the loss is scaled (`train/loss_scale`), and
    a gradient that overflows halves the scale: that step is skipped, too, but is no bad one while the scale is above 1.

    Args:
        tokenizer: what is trained, or what the trained part stands on; None where there is no tokenizer.
        optimizers: {name: partial torch optimizer waiting for its parameter groups}. A step of the run is a batch (or
            `accumulate` batches), whichever of them step on it.
        schedules: {name: function of zoo.training.schedules, its own arguments bound}; default: constant. They follow
            the steps of the run.
        gradient_clip: largest norm of an optimizer's gradient; 0: no clipping.
        accumulate: batches whose gradients make one step.
        max_bad_steps: more skipped steps of an optimizer in a row than this end the run.
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
        self._unchecked: list[tuple[int, str, list[str], Tensor]] = []  # steps whose finiteness was not read yet
        self._bad_in_a_row = Counter()  # of each optimizer
        self._skipped: Tensor | float = 0.0  # steps of the run
        self._before: list[tuple[Tensor, Tensor]] = []  # buffers, and what they were before the step at hand
        self._finite: dict[str, Tensor] = {}  # whether all losses of the step at hand were, by optimizer
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

    def checked(self, batch: dict) -> dict:
        """A batch as it was read, on the CPU, where looking at values waits for no device. Raises ZooError for one that
        this training cannot use."""
        return batch

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
        # what trainer=fsdp divides has groups of its own whatever the strategy: checkpoints are alike
        divisible = [p for block in blocks(self) for p in block.parameters()]
        for name, module in modules.items():
            optimizer = self.recipe[name](parameter_groups(module, apart=divisible))
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
        self._row, skipped = {}, torch.zeros((), dtype=torch.bool, device=self.device)
        if batch_idx % self.accumulate == 0:
            self._before = [(buffer, buffer.clone()) for buffer in moving_buffers(self)]
            self._finite = {}
        for i, (name, loss, logs) in enumerate(self.losses(batch)):
            optimizer = optimizers[name]
            finite = loss.detach().isfinite()
            self._finite[name] = self._finite.get(name, True) & finite
            # Gradients of a loss that is not finite are made so: their average tells the other ranks.
            loss = loss / torch.where(finite, float(self.accumulate), float("nan"))
            with nullcontext() if completes else self._no_sync():
                self._propagate(loss, optimizer)
            if completes:
                logs = logs | {f"lr/{name}": optimizer.param_groups[0]["lr"]}
                norm = self._step(name, optimizer, counts=i == 0)
                read = torch.stack([norm, self._finite[name].to(norm), self._loss_scale.to(norm)])
                self._unchecked.append((self.global_step, name, batch.get("key", []), read))
                skipped |= ~norm.isfinite()
                logs[f"gradient_norm/{name}"] = norm
            self.log_row(logs, batch_size(batch))
        if completes:
            self._finish_step(skipped, batch)
        self._log_throughput(batch_size(batch))
        if self.device.type == "cpu" or len(self._unchecked) >= self.trainer.log_every_n_steps:
            self._check_bad_steps()

    def log_row(self, logs: dict[str, Tensor | float], images: int) -> None:
        """Log scalars of the batch at hand as train/NAME, so that a resumed run has them, too."""
        logs = {f"train/{key}": value for key, value in logs.items()}
        self.log_dict(logs, batch_size=images)
        self._row |= logs

    def _finish_step(self, skipped: Tensor, batch: dict) -> None:
        """What is done once for all optimizers of a step; skipped: whether one of them did not step."""
        for buffer, before in self._before:
            buffer.copy_(torch.where(skipped, before, buffer))
        self._before = []
        self._skipped = skipped + self._skipped
        logs = {"skipped_steps": self._skipped}
        if self._scaler is not None:
            logs["loss_scale"] = self._loss_scale
            self._scaler.update()
        self.log_row(logs, batch_size(batch))
        for scheduler in _as_list(self.lr_schedulers()):
            scheduler.step()

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    @property
    def _loss_scale(self) -> Tensor:
        """Scalar; 1 where losses are not scaled. Nothing is read from the device."""
        one = torch.ones((), device=self.device)
        return one if self._scaler is None else self._scaler.scale(one)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """A batch is logged after the checkpoint behind it is written; a run killed in between has the row here."""
        checkpoint["skipped_steps"] = float(self._skipped)
        checkpoint["train_row"] = {name: float(value) for name, value in self._row.items()}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self._skipped = checkpoint.get("skipped_steps", 0.0)

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
        if self._scaler is not None:
            self._scaler.unscale_(raw)
        parameters = self.clipped(name, _parameters(raw))
        norm = total_norm([p.grad for p in parameters if p.grad is not None])
        for part in split(parameters) if self.gradient_clip else ():
            torch.nn.utils.clip_grads_with_norm_(part, self.gradient_clip, norm)
        bad = ~torch.isfinite(norm)
        if getattr(raw, "_step_supports_amp_scaling", False):
            raw.grad_scale, raw.found_inf = None, bad.float()  # a fused optimizer skips the step on the device
        elif bad:
            optimizer.zero_grad()
        with self._without_scaler():
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
        unchecked, self._unchecked = self._unchecked, []
        read = torch.stack([read for *_, read in unchecked])
        read[:, 1] = min_over_ranks(read[:, 1])
        for (step, optimizer, keys, _), (norm, finite, scale) in zip(unchecked, read.tolist(), strict=True):
            if np.isfinite(norm):
                self._bad_in_a_row[optimizer] = 0
                continue
            if finite and scale > 1:
                continue  # float16 overflowed, and the scale is halved
            self._bad_in_a_row[optimizer] += 1
            what, names = "gradient" if finite else "loss", ", ".join(keys[:4]) + (", ..." if len(keys) > 4 else "")
            batch = f"batch of {names or 'no named samples'}"
            self.print(f"step {step} was skipped: the {what} of the {optimizer} is not finite ({batch}).")
            if self._bad_in_a_row[optimizer] > self.max_bad_steps:
                raise ZooError(
                    f"{self._bad_in_a_row[optimizer]} steps in a row had no finite loss and gradient of the "
                    f"{optimizer}, the last on the {batch}; look at these samples, or lower optimizer.lr."
                )

    @contextmanager
    def _without_scaler(self) -> Iterator[None]:
        """Lightning would scale back a second time, and change the scale after each of several optimizers."""
        plugin, scaler = self.trainer.precision_plugin, self._scaler
        if scaler is None:
            yield
            return
        plugin.scaler = None
        try:
            yield
        finally:
            plugin.scaler = scaler

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


def parameter_groups(module: nn.Module, apart: Collection[nn.Parameter] = ()) -> list[dict]:
    """All parameters that require gradients: those of two axes and more decay as the optimizer says, others never.

    Those in `apart` have groups of their own.
    """
    parameters, keys = [p for p in module.parameters() if p.requires_grad], {id(p) for p in apart}
    groups = []
    for few in (False, True):
        for inside in (False, True):
            chosen = [p for p in parameters if (p.ndim < 2) == few and (id(p) in keys) == inside]
            groups += [{"params": chosen} | ({"weight_decay": 0.0} if few else {})] if chosen else []
    return groups


def moving_buffers(module: nn.Module) -> list[Tensor]:
    """Those that a forward pass may change: the buffers of all parts that are in training mode."""
    return [buffer for part in module.modules() if part.training for buffer in part.buffers(recurse=False)]


def batch_size(batch: dict) -> int:
    """Number of samples of a batch."""
    return len(next(value for value in batch.values() if isinstance(value, (Tensor, Tokens))))


def _parameters(optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _as_list(value) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]

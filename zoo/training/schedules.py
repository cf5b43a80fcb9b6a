"""Learning-rate schedules: (optimizer steps done, steps of the run, steps of an epoch) -> factor of the base rate."""

import math
from collections.abc import Sequence

from zoo.errors import ZooError


def constant(step: int, total: int, epoch: int, warmup_steps: int = 0) -> float:
    """Linear warm-up from 0, then 1."""
    return min(1.0, step / warmup_steps) if warmup_steps else 1.0


def cosine(
    step: int,
    total: int,
    epoch: int,
    warmup_steps: int = 0,
    min_ratio: float = 0.0,
    warmup_epochs: float = 0.0,
    warmup_offset: int = 0,
) -> float:
    """Linear warm-up from 0 over warmup_steps (or warmup_epochs), then half a cosine from 1 to min_ratio at the end.

    warmup_offset: added to the step during warm-up; 1 where the first step has a rate above 0 already (DualToken).
    Raises ZooError when the run has no end, or an epoch none and warmup_epochs are asked for.
    """
    if total < 0:
        raise ZooError("a cosine schedule needs the length of the run; set trainer.max_steps or trainer.max_epochs.")
    if warmup_epochs:
        if epoch < 0:
            raise ZooError("warmup_epochs needs the length of an epoch, which is unknown; set schedule.warmup_steps.")
        warmup_steps = warmup_epochs * epoch
    if step < warmup_steps:
        return (step + warmup_offset) / warmup_steps
    share = min(1.0, (step - warmup_steps) / max(1, total - warmup_steps))
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * share))


def floored_cosine(step: int, total: int, epoch: int, warmup_steps: int = 0, min_ratio: float = 0.0) -> float:
    """Linear warm-up from 0, then half a cosine from 1 to 0 at the end that is cut off at min_ratio (IBQ).

    Raises ZooError when the run has no end.
    """
    if total < 0:
        raise ZooError("a floored_cosine schedule needs the length of the run; set trainer.max_steps or max_epochs.")
    if step < warmup_steps:
        return step / warmup_steps
    share = min(1.0, (step - warmup_steps) / max(1, total - warmup_steps))
    return max(min_ratio, 0.5 * (1 + math.cos(math.pi * share)))


def annealed(
    step: int,
    total: int,
    epoch: int,
    warmup_steps: int = 0,
    first_ratio: float = 0.005,
    last_ratio: float = 0.01,
    shape: str = "linear",
) -> float:
    """Linear warm-up from first_ratio, then to last_ratio at the last step (IBQ's pretraining code): "cosine" by half a
    cosine, "linear" after a twentieth of the way at 1. Past the end they go on, not clamped, as published.

    Raises ZooError when the run has no end, or for another shape.
    """
    if total < 0:
        raise ZooError("an annealed schedule needs the length of the run; set trainer.max_steps or trainer.max_epochs.")
    if shape not in ("cosine", "linear"):
        raise ZooError(f"schedule.shape must be 'cosine' or 'linear', got {shape!r}.")
    if step < warmup_steps:
        return first_ratio + (1 - first_ratio) * step / warmup_steps
    share = (step - warmup_steps) / max(1, total - 1 - warmup_steps)
    if shape == "cosine":
        return last_ratio + (1 - last_ratio) * 0.5 * (1 + math.cos(math.pi * share))
    return 1.0 if share < 0.05 else last_ratio + (1 - last_ratio) * (1 - share) / 0.95


def milestones(step: int, total: int, epoch: int, epochs: Sequence[int] = (), factor: float = 0.1) -> float:
    """factor ** n, n the number of those epochs, counted from 1, that are over.

    Raises ZooError when there are some and an epoch has no known length.
    """
    if epochs and epoch < 0:
        raise ZooError("a milestones schedule needs the length of an epoch, which is unknown; set schedule.epochs=[].")
    return factor ** sum(step >= end * epoch for end in epochs)


def late_cosine(
    step: int,
    total: int,
    epoch: int,
    start_epochs: float = 0.0,
    warmup_epochs: float = 0.0,
    min_ratio: float = 0.0,
) -> float:
    """0 until start_epochs; from there linear warm-up from 0, then half a cosine towards min_ratio (the discriminator
    of DualToken).

    The cosine is as long as that of a run without start_epochs, which therefore ends before it does. A warm-up that is
    no whole number of steps ends with the last one within, below 1, and the cosine falls from there.
    Raises ZooError when the run or an epoch has no known length.
    """
    if total < 0 or epoch < 0:
        raise ZooError("a late_cosine schedule needs the length of the run and of an epoch; set trainer.max_epochs.")
    step, warmup = step - math.ceil(start_epochs * epoch), warmup_epochs * epoch
    if step < 0:
        return 0.0
    if step < warmup:
        return step / warmup
    peak = math.floor(warmup) / warmup if warmup else 1.0
    share = (step - math.floor(warmup)) / max(1, total - warmup)
    return min_ratio + (peak - min_ratio) * 0.5 * (1 + math.cos(math.pi * share))


def stepped_in_epoch(step: int, total: int, epoch: int, decay: float = 0.98, every: int = 500) -> float:
    """decay ** n, n growing at iterations 0, every, 2 every, ... of each epoch (AURORA's and AiT's training script)."""
    if step == 0:
        return 1.0
    epochs_done, iteration = divmod(step - 1, epoch)
    return decay ** (epochs_done * math.ceil(epoch / every) + iteration // every + 1)


def plateau(
    step: int,
    total: int,
    epoch: int,
    warmup_epochs: float = 0.0,
    decay_after_epochs: float = 0.0,
    min_ratio: float = 0.0,
) -> float:
    """Linear warm-up from 0, then 1 until decay_after_epochs, then half a cosine to min_ratio at the end (xAR).

    Raises ZooError when the run or an epoch has no known length.
    """
    if total < 0 or epoch < 0:
        raise ZooError("a plateau schedule needs the length of the run and of an epoch; set trainer.max_epochs.")
    warmup, decay = warmup_epochs * epoch, decay_after_epochs * epoch
    if step < warmup:
        return step / warmup
    if step < decay:
        return 1.0
    share = min(1.0, (step - decay) / max(1, total - decay))
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * share))


def epoch_cosine(
    step: int,
    total: int,
    epoch: int,
    warmup_steps: int = 0,
    first_ratio: float = 0.0,
    min_ratio: float = 0.0,
) -> float:
    """Linear warm-up from first_ratio within the first epoch, then 1 to its end; from the second epoch on half a cosine
    to min_ratio that moves with whole epochs alone (LAVIS, hence SEED).

    Raises ZooError when the run or an epoch has no known length.
    """
    if total < 0 or epoch < 0:
        raise ZooError("an epoch_cosine schedule needs the length of the run and of an epoch; set trainer.max_epochs.")
    if step < epoch:
        return min(1.0, first_ratio + (1 - first_ratio) * step / warmup_steps) if warmup_steps else 1.0
    share = min(1.0, (step // epoch) / math.ceil(total / epoch))
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * share))

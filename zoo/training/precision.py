"""Half precision on the CPU, as it is on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

FLOAT32 = {
    *(F.group_norm, F.layer_norm, F.rms_norm, F.normalize, F.cosine_similarity),
    *(F.softmax, torch.softmax, Tensor.softmax, F.log_softmax, torch.log_softmax, Tensor.log_softmax),
    *(F.cross_entropy, F.binary_cross_entropy_with_logits, F.l1_loss, F.mse_loss, F.smooth_l1_loss, F.softplus),
    *(torch.exp, Tensor.exp, torch.log, Tensor.log),
}
"""What autocast leaves in float32 on GPUs, and with the exception of mse_loss not on the CPU."""


class CPUPrecision(MixedPrecision):
    """Autocast on the CPU to bfloat16, or to float16 with a scaled loss (for which Lightning would take bfloat16).

    Normalisations, softmax and losses are in float32, as on GPUs: in bfloat16 they cost part of what is learned.

    Args:
        precision: "bf16-mixed" or "16-mixed".
    """

    def __init__(self, precision: str):
        super().__init__(precision, "cpu")

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        with super().forward_context(), _Float32():
            yield


class _Float32(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function not in FLOAT32 or not torch.is_autocast_enabled("cpu"):
            return function(*args, **kwargs)
        half = torch.half, torch.bfloat16
        args, kwargs = tree_map_only(Tensor, lambda t: t.float() if t.dtype in half else t, (args, kwargs))
        with torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

"""Normalisation over the batches of all ranks."""

import torch
from torch import Tensor, nn

from zoo.distributed import mean_over_ranks, world_size


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose training statistics are those of all ranks, on any device (torch's SyncBatchNorm needs a GPU).

    N ranks with batches of B are one rank with N * B, running averages included.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            values = x.to(torch.promote_types(x.dtype, torch.float32))
            mean = mean_over_ranks(values.mean((0, 2, 3)))  # ranks have equal batches
            # the mean square less the square of the mean would lose digits
            variance = mean_over_ranks((values - _channels(mean)).square().mean((0, 2, 3)))
            with torch.no_grad():
                self.num_batches_tracked += 1
                count = x.numel() / x.shape[1] * world_size()
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            scale = self.weight * (variance + self.eps).rsqrt()
            return (values * _channels(scale) + _channels(self.bias - mean * scale)).to(x.dtype)


def _channels(vector: Tensor) -> Tensor:
    return vector[:, None, None]

"""Training of AURORA's VQ-VAE (specification of the authors' script: mean squared error and commitment, one Adam)."""

import torch.nn.functional as F
from torch import Tensor

from zoo.losses import reconstruction_loss
from zoo.tokenizers.aurora.tokenizer import AuroraOutput, AuroraTokenizer
from zoo.training.module import Losses, TrainingModule


def aurora_losses(
    tokenizer: AuroraTokenizer, output: AuroraOutput, target: Tensor, loss: str = "mse"
) -> tuple[Tensor, Tensor]:
    """(total, reconstruction): the reconstruction loss in the network's scaled space plus the commitment term.

    target: (B, C, H, W) values, or classes in channel 0 (-1: ignored) for the classification objective.
    """
    if tokenizer.config.objective == "classification":
        reconstruction = F.cross_entropy(output.raw, target[:, 0].long(), ignore_index=-1)
    else:
        reconstruction = reconstruction_loss(loss)(output.raw, tokenizer.scale(target))
    return reconstruction + output.quantizer_loss, reconstruction


class AuroraTraining(TrainingModule):
    """One optimizer, one loss.

    Args:
        loss: a name of zoo.losses.RECONSTRUCTION.
        mask_ratio, mask_patch: share of patches of the input set to 0 while the target stays whole; AiT's depth
            recipe has 0.5 of patches of 16 pixels, AURORA none.
        others: of TrainingModule.
    """

    def __init__(
        self,
        tokenizer: AuroraTokenizer,
        loss: str = "mse",
        mask_ratio: float = 0.0,
        mask_patch: int = 16,
        **arguments,
    ):
        super().__init__(tokenizer, **arguments)
        reconstruction_loss(loss)  # an unknown name fails now, not after the data was set up
        self.loss, self.mask_ratio, self.mask_patch = loss, mask_ratio, mask_patch

    def losses(self, batch: dict) -> Losses:
        target = self.tokenizer.to_values(batch[self.tokenizer.info.input])
        values = self.masked(target) if self.mask_ratio else target
        output = self.tokenizer(values)
        total, reconstruction = aurora_losses(self.tokenizer, output, target, self.loss)
        logs = {
            "loss": total.detach(),
            "reconstruction": reconstruction.detach(),
            "quantizer": output.quantizer_loss.detach(),
        }
        yield "tokenizer", total, logs

    def masked(self, values: Tensor) -> Tensor:
        """Values (B, C, H, W) with a share of their patches set to 0."""
        height, width = (side // self.mask_patch for side in values.shape[-2:])
        keep = values.new_empty(len(values), 1, height, width).uniform_() >= self.mask_ratio
        return values * F.interpolate(keep.to(values.dtype), size=values.shape[-2:], mode="nearest")

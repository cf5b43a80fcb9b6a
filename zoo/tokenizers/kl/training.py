"""Training of a KL autoencoder (arXiv 2112.10752). MAR's recipe for KL-16 is not published; this is ours."""

from torch import Tensor

from zoo.tokenizers.kl.tokenizer import KLTokenizer
from zoo.training.autoencoder import AutoencoderTraining


class KLTraining(AutoencoderTraining):
    """Its regularizer is kl_weight times the KL divergence of the posterior from N(0, 1), per value of the image.

    Args:
        kl_weight: 1e-6 in latent diffusion.
        others: of AutoencoderTraining.
    """

    def __init__(self, tokenizer: KLTokenizer, kl_weight: float = 1e-6, **arguments):
        super().__init__(tokenizer, **arguments)
        self.kl_weight = kl_weight

    def regularized(self, values: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        reconstruction, posterior = self.tokenizer(values)
        divergence = posterior.kl().mean()
        return reconstruction, self.kl_weight * divergence / values[0].numel(), {"kl": divergence}

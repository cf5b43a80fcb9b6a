"""Training of a KL autoencoder (arXiv 2112.10752). MAR's recipe for KL-16 is not published; this is ours."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from zoo.distributed import world_size
from zoo.tokenizers.kl.tokenizer import KLTokenizer
from zoo.training.autoencoder import AutoencoderTraining, Regularized


class KLTraining(AutoencoderTraining):
    """Its regularizer is kl_weight times the KL divergence of the posterior from N(0, 1), per value of the image.

    Args:
        kl_weight: 1e-6 in latent diffusion.
        measure_scale: store as scale_factor what makes the standard deviation of the latents of the last validation 1;
            False: keep the configured one.
        others: of AutoencoderTraining.
    """

    def __init__(self, tokenizer: KLTokenizer, kl_weight: float = 1e-6, measure_scale: bool = True, **arguments):
        super().__init__(tokenizer, **arguments)
        self.kl_weight, self.measure_scale = kl_weight, measure_scale

    def regularized(self, values: Tensor) -> Regularized:
        posterior = self.tokenizer.posterior(values)
        count, *shape = posterior.mean.shape
        generator = self.shared_generator(values.device)  # an image's noise does not depend on the number of ranks
        noise = torch.randn(count * world_size(), *shape, device=values.device, generator=generator)
        reconstruction = self.tokenizer.decode_latents(posterior.sample(self.own_rows(noise)))
        divergence = posterior.kl().mean()
        loss = self.kl_weight * divergence / values[0].numel()
        return Regularized(reconstruction, loss, codes=None, logs={"kl": divergence})

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        with torch.no_grad():
            posterior = self.tokenizer.posterior(self.tokenizer.config.to_values(batch["image"]))
        variance = posterior.mean.var() + posterior.logvar.exp().mean()
        self.log("val/latent_variance", variance, batch_size=len(batch["image"]), sync_dist=True)

    def save(self, folder: Path) -> Path:
        variance = self.trainer.callback_metrics.get("val/latent_variance")
        if self.measure_scale and variance is not None:
            self.tokenizer.config = replace(self.tokenizer.config, scale_factor=float(variance) ** -0.5)
        return super().save(folder)

"""Training of the flow decoder, the zoo's own: SEED uses a trained unCLIP model as it is."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import registry
from zoo.data import Loader
from zoo.errors import ZooError
from zoo.flow import interpolate, logit_normal, velocity
from zoo.nn.autoencoder import to_tokens
from zoo.tokenizer import ImageReader, Tokenizer
from zoo.tokenizers.kl.tokenizer import KLTokenizer
from zoo.tokenizers.seed.decoder import FlowDecoder, check_space
from zoo.training.module import Losses, TrainingModule, batch_size


class FlowDecoderTraining(TrainingModule):
    """Flow matching of the latents of an image, given the embedding of that image; one optimizer.

    Args:
        tokenizer: whose latents the decoder makes; frozen.
        decoder: what is trained.
        teacher: an encoder with its weights, which gives the embeddings; frozen.
        tokenizer_weights: a file, where the tokenizer's name alone has none.
        decoder_weights: a file to start from, whose statistics of embeddings are kept.
        noised_share: of the embeddings, mixed with noise in training; the others are as they are.
        measured_images: of the first epoch, from which the mean and the standard deviation of embeddings are taken
            before the first step.
        others: of TrainingModule.

    Raises:
        ZooError: a tokenizer or a teacher that is not the decoder's, or settings that are not possible.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        decoder: FlowDecoder,
        teacher: ImageReader,
        tokenizer_weights: str | Path | None = None,
        decoder_weights: str | Path | None = None,
        noised_share: float = 0.5,
        measured_images: int = 4096,
        **arguments,
    ):
        if not 0 <= noised_share <= 1:
            raise ZooError(f"noised_share must be a share from 0 to 1, got {noised_share}.")
        if measured_images < 2:
            raise ZooError(f"measured_images must be at least 2, got {measured_images}.")
        space = registry.tokenizers.with_weights(tokenizer, tokenizer_weights)
        check_space(decoder, space)
        if (teacher.info.name, teacher.info.embed_dim) != (decoder.info.encoder, decoder.info.embed_dim):
            raise ZooError(
                f"{decoder.info.name} reads embeddings of {decoder.info.encoder} of {decoder.info.embed_dim} values, "
                f"and the teacher {teacher.info.name} has {teacher.info.embed_dim}; set decoder.encoder and "
                "decoder.embed_dim."
            )
        if decoder_weights is not None:
            decoder = registry.decoders.with_weights(decoder, decoder_weights).train()
        super().__init__(space.requires_grad_(False), **arguments)
        self.decoder, self.teacher = decoder, teacher.requires_grad_(False)
        self.noised_share, self.measured_images = noised_share, measured_images
        self.measures = decoder_weights is None

    def optimized(self) -> dict[str, nn.Module]:
        return {"decoder": self.decoder}

    def compiled(self) -> list[nn.Module]:
        return [self.decoder]

    def train(self, mode: bool = True) -> FlowDecoderTraining:
        super().train(mode)
        self.tokenizer.eval()
        self.teacher.eval()
        return self

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.measures and self.trainer.ckpt_path is None:
            self.teacher.to(self.trainer.strategy.root_device)
            self.measure()

    @torch.no_grad()
    def measure(self) -> None:
        """Set the statistics of embeddings to those of the first batches of training, over all ranks.

        Every rank reads them all, so that their number does not matter, not even for the order of a sum.
        """
        data = self.trainer.datamodule
        if data is None:
            raise ZooError("the statistics of embeddings are measured on a data module; give the trainer a datamodule.")
        options = data.options | {"batch_size": data.options["batch_size"] * self.trainer.world_size}
        number = -(-self.measured_images // options["batch_size"])
        batches = islice(Loader(data.train, training=True, **options), number)
        device = self.trainer.strategy.root_device
        embeddings = torch.cat([self.embeddings(batch["image"].to(device)).float().cpu() for batch in batches]).double()
        self.decoder.mean.copy_(embeddings.mean(0))
        self.decoder.std.copy_(embeddings.std(0).clamp(min=1e-6))  # one value alone would not be divided by

    def losses(self, batch: dict) -> Losses:
        loss = self.flow_loss(batch, self.shared_generator(self.device))
        yield "decoder", loss, {"loss": loss.detach()}

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """The loss with exact embeddings of all images, at times and noise that are the same in every validation."""
        loss = self.flow_loss(batch, torch.Generator(self.device).manual_seed(batch_idx), exact=True)
        self.log_dict({"val/loss": loss}, batch_size=batch_size(batch), sync_dist=True, prog_bar=True)

    def flow_loss(self, batch: dict, draws: torch.Generator, exact: bool = False) -> Tensor:
        """Mean squared error of the velocities.

        What belongs to an image is drawn for the images of all ranks, so that their number does not matter. exact: no
        embedding is left out or mixed with noise.
        """
        decoder, images = self.decoder, batch["image"]
        c, count = decoder.config, len(images) * self.trainer.world_size
        drawn = {"device": self.device, "generator": draws}
        t = self.own_rows(logit_normal((count,), **drawn))
        noise = self.own_rows(torch.randn(count, c.grid**2, c.latent_dim, **drawn))
        data = self.latents(images, self.own_rows(torch.randn(count, c.latent_dim, c.grid, c.grid, **drawn)))
        z, levels = decoder.whiten(self.embeddings(images)), torch.zeros_like(t)
        if not exact:
            drops, noises, levels = self.own_rows(torch.rand(count, 3, **drawn)).unbind(1)
            dropped = drops < c.condition_dropout
            # squared: the errors of good estimates are small levels
            levels = levels.square().where((noises < self.noised_share) & ~dropped, 0)
            z = interpolate(z, self.own_rows(torch.randn(count, c.embed_dim, **drawn)), levels)
            z = decoder.no_embedding.where(dropped[:, None], z)
        prediction = decoder(interpolate(data, noise, t), t, z, levels)
        return (prediction - velocity(data, noise)).square().mean()

    @torch.no_grad()
    def latents(self, images: Tensor, noise: Tensor) -> Tensor:
        """(B, N, C) of images (B, 3, H, W); of a KL autoencoder drawn from the posterior with noise (B, C, g, g)."""
        space = self.tokenizer
        if isinstance(space, KLTokenizer):
            return to_tokens(space.scaled_latents(space.config.to_values(images), True, noise))
        return space._encode(images).latents["image"]  # `encode` would wait for the device to check the images

    @torch.no_grad()
    def embeddings(self, images: Tensor) -> Tensor:
        """(B, E) of images (B, 3, H, W), which are resized to the size that the teacher was made for."""
        size = (self.teacher.info.image_size,) * 2
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        return self.teacher._encode_image(images)  # before it is normalised, and without checks

    @torch.no_grad()
    def pictures(self, batch: dict, count: int) -> Tensor:
        """Images, their reconstructions from the latents that the autoencoder has, and from their embeddings."""
        images = batch["image"][:count]
        decoded = self.tokenizer.decode(self.decoder.sample(self.embeddings(images)))
        return torch.cat([images, self.tokenizer.reconstruct(images), decoded])

    def save(self, folder: Path) -> Path:
        path = folder / "decoder.safetensors"
        registry.save(self.decoder, path)
        return path

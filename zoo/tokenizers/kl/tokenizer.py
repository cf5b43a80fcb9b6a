"""The KL autoencoder of latent diffusion (arXiv 2112.10752) as MAR (arXiv 2406.11838) trained it: KL-16."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from zoo.nn.autoencoder import AutoencoderConfig, Decoder, Encoder, to_map, to_tokens
from zoo.quantizers import GaussianPosterior
from zoo.tokenizer import Preset, Tokenizer, TokenizerInfo, Tokens, Weights


@dataclass(frozen=True)
class KLConfig(AutoencoderConfig):
    """Sizes of the autoencoder; the defaults are MAR's KL-16."""

    decoder_attention: bool = False
    scale_factor: float = 0.2325
    """Latents are multiplied by this, which gives them a standard deviation of about 1."""


class KLTokenizer(Tokenizer):
    """Maps images (B, 3, H, W) to one latent vector for each place of a grid of H/downsample x W/downsample, and back.

    Latents of the contract are scaled: scale_factor * (mean or sample of the posterior).
    """

    Config = KLConfig

    def __init__(self, config: KLConfig):
        super().__init__(config)
        c = config
        self.encoder = Encoder(c, 2 * c.embed_dim)
        self.quant_conv = nn.Conv2d(2 * c.embed_dim, 2 * c.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(c.embed_dim, c.embed_dim, 1)
        self.decoder = Decoder(c, c.embed_dim)
        self.info = TokenizerInfo(
            system="kl",
            paper="arXiv:2406.11838",
            image_size=c.image_size,
            size_multiple=c.downsample,
            channels=c.in_channels,
            kind="continuous",
            streams=("image",),
            latent_dims={"image": c.embed_dim},
            max_tokens=(c.image_size // c.downsample) ** 2,
        )

    def moments(self, values: Tensor) -> Tensor:
        """Values (B, 3, H, W) to means and log variances (B, 2 D, h, w) of the posterior."""
        return self.quant_conv(self.encoder(values))

    def posterior(self, values: Tensor) -> GaussianPosterior:
        """Values (B, 3, H, W) to the posterior of unscaled latents (B, D, h, w)."""
        return GaussianPosterior.from_moments(self.moments(values))

    def scaled_latents(self, values: Tensor, sample_posterior: bool, noise: Tensor | None = None) -> Tensor:
        """Values (B, 3, H, W) to latents (B, D, h, w) of the contract; noise: see GaussianPosterior.sample."""
        posterior = self.posterior(values)
        return self.drawn(posterior, noise) if sample_posterior else self.config.scale_factor * posterior.mean

    def drawn(self, posterior: GaussianPosterior, noise: Tensor | None = None) -> Tensor:
        """Latents (B, D, h, w) of the contract, drawn from a posterior; noise: see GaussianPosterior.sample."""
        return self.config.scale_factor * posterior.sample(noise)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Unscaled latents (B, D, h, w) to values (B, 3, H, W), not clamped."""
        return self.decoder(self.post_quant_conv(latents))

    def forward(self, values: Tensor) -> tuple[Tensor, GaussianPosterior]:
        """Values (B, 3, H, W) to the reconstruction from a sample, and the posterior."""
        posterior = self.posterior(values)
        return self.decode_latents(posterior.sample()), posterior

    def _encode(self, images: Tensor, sample_posterior: bool = False) -> Tokens:
        latents = self.scaled_latents(self.config.to_values(images), sample_posterior)
        return Tokens(latents={"image": to_tokens(latents)}, grid=tuple(latents.shape[2:]))

    def _decode(self, tokens: Tokens) -> Tensor:
        latents = to_map(tokens.latents["image"].to(self.dtype), tokens.grid) / self.config.scale_factor
        return self.config.to_images(self.decode_latents(latents))


PRESETS = {
    "kl-f16": Preset(
        KLTokenizer,
        KLConfig(),
        "KL-16 autoencoder of MAR, base of KARL and xAR: 256 x 256 images, 256 latents of 16 values",
        Weights(manual="kl16.ckpt from the download script of https://github.com/LTH14/mar"),
        "MIT",
    ),
    "kl-tiny": Preset(
        KLTokenizer,
        KLConfig(
            image_size=64,
            channels=16,
            multipliers=(1, 1, 4, 4),
            num_blocks=1,
            embed_dim=8,
            attention=(),
            norm_groups=8,
            scale_factor=0.62,
        ),
        "small KL autoencoder trained on the embedded scenes: 64 x 64 images, 64 latents of 8 values",
        Weights("kl-tiny.safetensors", "60439f081fd6b69b1acde3efb43218ba9c8f2d9ba5eb155e68e1e0aefb6f9288"),
    ),
}

"""The VQ-VAE of AURORA (arXiv 2412.03548), which is that of AiT (arXiv 2301.02229) retrained on pseudo depth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.quantizers import EMAQuantizer
from zoo.tokenizer import Preset, Tokenizer, TokenizerInfo, Tokens, Weights, raster


@dataclass(frozen=True)
class AuroraConfig:
    """Sizes of the VQ-VAE; the defaults are AURORA's published depth tokenizer."""

    image_size: int = 320
    """Side of the maps it is made for; the network is convolutional and takes any multiple of `downsample`."""
    channels: int = 1
    hidden_dim: int = 16
    """Channels after the first convolution; each further halving of the resolution doubles them."""
    downsample: int = 32
    num_blocks: int = 2
    block: str = "v1"
    """Residual block: "v1" without normalisation (all releases) or "v2" with BatchNorm."""
    objective: str = "regression"
    """"regression" of values, or "classification", whose output channels are logits of classes."""
    codebook_size: int = 128
    codebook_dim: int = 512
    ema_decay: float = 0.99
    commitment: float = 0.25
    codebook_init: str = "published"
    """"published" (normal, sums drawn apart from codes) or "data" (vectors of the first batch)."""
    restart_below: float = 0.0
    """Codes whose running count falls below this are restarted from the batch; 0: never, as published."""
    value_range: tuple[float, float] = (-1.0, 1.0)
    """Values of the network that 0 and 1 of an image stand for."""
    max_value: float = 0.0
    """When above 0 the network sees 2 (v / max_value - 0.5) for a value v (`use_norm` of the authors)."""
    stream: str = "depth"

    def __post_init__(self):
        if self.downsample < 2 or self.downsample & (self.downsample - 1):
            raise ZooError(f"AuroraConfig.downsample must be a power of two from 2, got {self.downsample}.")
        for name, known in (
            ("block", ("v1", "v2")),
            ("objective", ("regression", "classification")),
            ("codebook_init", ("published", "data")),
            ("stream", ("depth", "image")),
        ):
            if getattr(self, name) not in known:
                raise ZooError(f"AuroraConfig.{name} must be one of {known}, got {getattr(self, name)!r}.")
        for name in ("image_size", "channels", "hidden_dim", "codebook_size", "codebook_dim"):
            if getattr(self, name) < 1:
                raise ZooError(f"AuroraConfig.{name} must be at least 1, got {getattr(self, name)}.")
        if self.image_size % self.downsample:
            raise ZooError(f"AuroraConfig.image_size {self.image_size} is no multiple of downsample {self.downsample}.")


class AuroraOutput(NamedTuple):
    """What one pass through the VQ-VAE gives; everything but `reconstruction` is in the network's scaled space."""

    z: Tensor
    """(B, D, h, w): encoder output."""
    quantized: Tensor
    """(B, D, h, w): its codes, straight-through."""
    ids: Tensor
    """(B, h, w) int64."""
    quantizer_loss: Tensor
    perplexity: Tensor
    raw: Tensor
    """(B, C, H, W): decoder output."""
    reconstruction: Tensor
    """(B, C, H, W): decoder output in values, or (B, 1, H, W) classes."""


class ResidualBlock(nn.Module):
    """ "v1": x + net(x); "v2": ReLU(x + net(x)) with BatchNorm and no bias."""

    def __init__(self, width: int, kind: str):
        super().__init__()
        self.activation = nn.ReLU() if kind == "v2" else nn.Identity()
        if kind == "v1":
            self.net = nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(width, width, 1),
            )
        else:
            self.net = nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x + self.net(x))


class AuroraTokenizer(Tokenizer):
    """Maps (B, C, H, W) to ids on a grid of H/downsample x W/downsample, and back."""

    Config = AuroraConfig

    def __init__(self, config: AuroraConfig):
        super().__init__(config)
        c = config
        widths = [c.hidden_dim * 2**i for i in range(int(math.log2(c.downsample)))]
        width = widths[-1]
        down = [
            layer
            for inner, outer in pairwise([c.channels, *widths])
            for layer in (nn.Conv2d(inner, outer, 4, stride=2, padding=1), nn.ReLU())
        ]
        up = [
            layer
            for inner, outer in pairwise([width, *reversed(widths)])
            for layer in (nn.ConvTranspose2d(inner, outer, 4, stride=2, padding=1), nn.ReLU())
        ]
        self.encoder = nn.Sequential(
            *down,
            *(ResidualBlock(width, c.block) for _ in range(c.num_blocks)),
            nn.Conv2d(width, c.codebook_dim, 1),
        )
        self.quantizer = EMAQuantizer(
            c.codebook_size,
            c.codebook_dim,
            decay=c.ema_decay,
            commitment=c.commitment,
            init=c.codebook_init,
            restart_below=c.restart_below,
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(c.codebook_dim, width, 1),
            nn.ReLU(),
            *(ResidualBlock(width, c.block) for _ in range(c.num_blocks)),
            *up,
            nn.Conv2d(c.hidden_dim, c.channels, 1),
        )
        self.info = TokenizerInfo(
            system="aurora",
            paper="arXiv:2412.03548",
            image_size=c.image_size,
            size_multiple=c.downsample,
            channels=c.channels,
            kind="discrete",
            streams=(c.stream,),
            codebook_sizes={c.stream: c.codebook_size},
            embedding_dim=c.codebook_dim,
            max_tokens=(c.image_size // c.downsample) ** 2,
            decodes_to="depth" if c.stream == "depth" else "pixels",
        )

    def forward(self, values: Tensor) -> AuroraOutput:
        """Values (B, C, H, W) in the range of the training data, not of the contract: one pass, for training."""
        z = self.encoder(self.scale(values))
        quantized = self.quantizer(z.movedim(1, -1))
        codes = quantized.quantized.movedim(-1, 1)
        raw = self.decoder(codes)
        return AuroraOutput(
            z, codes, quantized.ids, quantized.loss, quantized.perplexity, raw, self.reconstruction(raw)
        )

    def scale(self, values: Tensor) -> Tensor:
        """Values to the space in which the network works and the loss is taken."""
        return 2 * (values / self.config.max_value - 0.5) if self.config.max_value else values

    def reconstruction(self, raw: Tensor) -> Tensor:
        """Decoder output to values, or to the most likely class of each pixel."""
        if self.config.objective == "classification":
            return raw.argmax(1, keepdim=True)
        return self.config.max_value * (0.5 * raw + 0.5) if self.config.max_value else raw

    def decode_ids(self, ids: Tensor) -> Tensor:
        """(B, h, w) int64 to values (B, C, H, W), not clamped."""
        return self.reconstruction(self.decoder(self.quantizer.codebook[ids].movedim(-1, 1)))

    def decode_soft(self, logits: Tensor, temperature: float = 1.0) -> Tensor:
        """Logits over the codes (B, K, h, w) to values (B, C, H, W), differentiable.

        Each place gets the mixture softmax(logits / temperature) of all codes: the task solver of AiT (with tau =
        1 / temperature), and AURORA's reconstruction loss on a language model's words.
        """
        weights = (logits / temperature).softmax(1)
        codes = torch.einsum("bkhw,kd->bdhw", weights, self.quantizer.codebook.to(weights.dtype))
        return self.reconstruction(self.decoder(codes))

    def to_values(self, images: Tensor) -> Tensor:
        """Images in [0, 1] to the range of the training data."""
        low, high = self.config.value_range
        return low + (high - low) * images

    def _encode(self, images: Tensor) -> Tokens:
        ids = self.quantizer.encode(self.encoder(self.scale(self.to_values(images))).movedim(1, -1))
        return Tokens(ids={self.config.stream: ids.flatten(1)}, grid=tuple(ids.shape[1:]))

    def _decode(self, tokens: Tokens) -> Tensor:
        ids = tokens.ids[self.config.stream]
        values = self.decode_ids(ids.unflatten(1, raster(ids.shape[1], tokens.grid)))
        if self.config.objective == "classification":
            return values / max(self.config.channels - 1, 1)
        low, high = self.config.value_range
        return (values - low) / (high - low)


NO_LICENCE = "none stated by the authors (all rights reserved)"
AIT_PAGE = "the model list of https://github.com/SwinTransformer/AiT, whose download links have expired"

PRESETS = {
    "aurora-depth": Preset(
        AuroraTokenizer,
        AuroraConfig(),
        "published depth tokenizer: 320 x 320 relative depth, 100 words of 128",
        Weights(
            manual="vae-final.pt of the depth VQ-VAE from the Drive folder that "
            "https://github.com/mahtabbigverdi/Aurora-perception links to"
        ),
        NO_LICENCE,
    ),
    "ait-depth": Preset(
        AuroraTokenizer,
        AuroraConfig(image_size=480, value_range=(0.0, 10.0)),
        "its parent for metric depth (NYUv2, up to 10 m): 480 x 480, 225 words of 128",
        Weights(manual=f"vqvae_depth.pt from {AIT_PAGE}"),
        NO_LICENCE,
    ),
    "ait-mask": Preset(
        AuroraTokenizer,
        AuroraConfig(image_size=64, downsample=16, value_range=(0.0, 1.0), max_value=1.0, stream="image"),
        "its parent for instance masks: 64 x 64, 16 words of 128",
        Weights(manual=f"vqvae_insseg.pt from {AIT_PAGE}"),
        NO_LICENCE,
    ),
    "aurora-tiny": Preset(
        AuroraTokenizer,
        AuroraConfig(
            image_size=64,
            downsample=8,
            hidden_dim=16,
            codebook_dim=64,
            codebook_init="data",
            restart_below=1.0,
        ),
        "small depth tokenizer trained on the embedded scenes: 64 x 64, 64 words of 128",
        Weights("aurora-tiny.safetensors", "9afb38ea3141b14e2e3b54367d25d1ffb3f6466fc9eee8fd2a2998ce389c24bd"),
    ),
}

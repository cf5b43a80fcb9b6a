"""The convolutional autoencoders that VQGAN, latent diffusion and IBQ share, with the parameter names of the field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.tokenizer import raster


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of the two networks; the defaults are those of every published f16 model."""

    image_size: int = 256
    """Side of the images it is made for; attention sits where a level is `attention` pixels wide at this size, and
    stays there for images of another size."""
    in_channels: int = 3
    channels: int = 128
    """Width of level 0."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Width of each level over that of level 0; between two levels the resolution is halved."""
    num_blocks: int = 2
    """Residual blocks of an encoder level."""
    embed_dim: int = 16
    """Channels between the networks, per place of the grid."""
    style: str = "ldm"
    """"ldm" (latent diffusion, IBQ) or "mage" (MAGE, MaskGIT): see Encoder."""
    attention: tuple[int, ...] = (16,)
    """Sides of the levels with attention after each block."""
    decoder_attention: bool = True
    """Whether decoder levels have it too."""
    norm_groups: int = 32
    value_range: tuple[float, float] = (-1.0, 1.0)
    """Values of the network that 0 and 1 of an image stand for."""

    LEAST_BLOCKS: ClassVar[int] = 1
    """0 for a configuration of decoders alone, which have one block more."""

    def __post_init__(self):
        name = type(self).__name__
        if self.style not in ("ldm", "mage"):
            raise ZooError(f"{name}.style must be 'ldm' or 'mage', got {self.style!r}.")
        for field in ("image_size", "in_channels", "channels", "num_blocks", "embed_dim", "norm_groups"):
            least = self.LEAST_BLOCKS if field == "num_blocks" else 1
            if getattr(self, field) < least:
                raise ZooError(f"{name}.{field} must be at least {least}, got {getattr(self, field)}.")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ZooError(f"{name}.multipliers must be one factor of at least 1 per level, got {self.multipliers}.")
        if self.channels % self.norm_groups:
            raise ZooError(f"{name}.channels {self.channels} is no multiple of norm_groups {self.norm_groups}.")
        if self.image_size % self.downsample:
            raise ZooError(
                f"{name}.image_size {self.image_size} is no multiple of {self.downsample}, one token's side."
            )
        if self.style == "mage" and self.attention:
            raise ZooError(f"{name}: style 'mage' has no attention; set attention=().")

    @property
    def downsample(self) -> int:
        """Pixels per place of the grid, along a side."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def widths(self) -> list[int]:
        return [self.channels * m for m in self.multipliers]

    def attends(self, level: int) -> bool:
        """Whether a level has attention."""
        return self.image_size // 2**level in self.attention

    def to_values(self, images: Tensor) -> Tensor:
        """Images in [0, 1] to values of the network."""
        low, high = self.value_range
        return low + (high - low) * images

    def to_images(self, values: Tensor) -> Tensor:
        """Values of the network to images, nominally in [0, 1]."""
        low, high = self.value_range
        return (values - low) / (high - low)


class ResnetBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))); where widths differ the skip is a 1 x 1 convolution.

    In style "mage" convolutions have no bias, and a block that changes the width drops x: its skip is taken of its own
    result. kernel: side of the first convolution.
    """

    def __init__(self, inner: int, outer: int, c: AutoencoderConfig, kernel: int = 3):
        super().__init__()
        bias = c.style == "ldm"
        self.skips_input = c.style == "ldm"
        self.norm1 = nn.GroupNorm(c.norm_groups, inner, eps=1e-6)
        self.conv1 = nn.Conv2d(inner, outer, kernel, padding=kernel // 2, bias=bias)
        self.norm2 = nn.GroupNorm(c.norm_groups, outer, eps=1e-6)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=bias)
        if inner != outer:
            self.nin_shortcut = nn.Conv2d(inner if self.skips_input else outer, outer, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        if hasattr(self, "nin_shortcut"):
            x = self.nin_shortcut(x if self.skips_input else h)
        return x + h


class AttentionBlock(nn.Module):
    """x + attention over all places, one head of the full width."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.proj_out(h)


class Resample(nn.Module):
    """Half the resolution by a strided convolution (padded at the right and bottom), or twice it by the nearest pixel
    and a convolution.
    """

    def __init__(self, width: int, up: bool):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(width, width, 3, padding=1) if up else nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0) if self.up else F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where the level has it."""

    def __init__(self, inner: int, outer: int, num_blocks: int, attends: bool, c: AutoencoderConfig):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(outer if i else inner, outer, c) for i in range(num_blocks))
        self.attn = nn.ModuleList(AttentionBlock(outer, c.norm_groups) for _ in range(num_blocks if attends else 0))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x


class Middle(nn.Module):
    """Block, attention (not in style "mage"), block."""

    def __init__(self, width: int, c: AutoencoderConfig):
        super().__init__()
        self.block_1 = ResnetBlock(width, width, c)
        if c.style == "ldm":
            self.attn_1 = AttentionBlock(width, c.norm_groups)
        self.block_2 = ResnetBlock(width, width, c)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block_1(x)
        if hasattr(self, "attn_1"):
            x = self.attn_1(x)
        return self.block_2(x)


class Encoder(nn.Module):
    """(B, C, H, W) values to (B, out_channels, H / downsample, W / downsample).

    Style "mage" differs from "ldm" in that the first convolution has no bias, the resolution is halved by averaging,
    there is no attention and the last convolution is 1 x 1; and see ResnetBlock.
    """

    def __init__(self, c: AutoencoderConfig, out_channels: int):
        super().__init__()
        mage, widths = c.style == "mage", c.widths
        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1, bias=not mage)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(widths[max(i - 1, 0)], width, c.num_blocks, c.attends(i), c)
            if i < len(widths) - 1:
                level.downsample = nn.AvgPool2d(2) if mage else Resample(width, up=False)
            self.down.append(level)
        self.mid = Middle(widths[-1], c)
        self.norm_out = nn.GroupNorm(c.norm_groups, widths[-1], eps=1e-6)
        kernel = 1 if mage else 3
        self.conv_out = nn.Conv2d(widths[-1], out_channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """(B, in_channels, h, w) to (B, C, h * downsample, w * downsample) values, not clamped.

    A level has one block more than in the encoder in style "ldm", and as many in "mage". `up` is indexed by
    resolution: up.0, the full one, comes last.
    """

    def __init__(self, c: AutoencoderConfig, in_channels: int):
        super().__init__()
        widths, blocks = c.widths, c.num_blocks + (c.style == "ldm")
        self.conv_in = nn.Conv2d(in_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], c)
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            attends = c.decoder_attention and c.attends(i)
            level = Level(widths[min(i + 1, len(widths) - 1)], width, blocks, attends, c)
            if i:
                level.upsample = Resample(width, up=True)
            self.up.append(level)
        self.norm_out = nn.GroupNorm(c.norm_groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], c.in_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))


def to_map(tokens: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """(B, N, D) in raster order to (B, D, rows, columns); without a grid N must be a square. Raises ZooError."""
    return tokens.transpose(1, 2).unflatten(2, raster(tokens.shape[1], grid))


def to_tokens(features: Tensor) -> Tensor:
    """(B, D, rows, columns) to (B, N, D) in raster order."""
    return torch.flatten(features, 2).transpose(1, 2)

"""FSQ (arXiv 2309.15505) between the convolutional networks of latent diffusion."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from fsq.quantizer import ScalarQuantizer
from zoo import Preset, Tokenizer, TokenizerInfo, Tokens, ZooError
from zoo.nn.autoencoder import AutoencoderConfig, Decoder, Encoder, to_map, to_tokens
from zoo.quantizers import Quantized


@dataclass(frozen=True)
class FSQConfig(AutoencoderConfig):
    """Sizes of FSQ; the levels are those that the paper recommends for about 2^10 codes."""

    levels: tuple[int, ...] = (8, 5, 5, 5)
    """Values that each number of a code can take."""
    embed_dim: int = 4
    """Numbers of a code: as many as there are levels."""

    def __post_init__(self):
        super().__post_init__()
        if self.embed_dim != len(self.levels):
            raise ZooError(f"FSQConfig.embed_dim must be {len(self.levels)} for levels {self.levels}; set both.")


class FSQTokenizer(Tokenizer):
    """Maps images (B, 3, H, W) to ids on a grid of H/downsample x W/downsample, and back."""

    Config = FSQConfig

    def __init__(self, config: FSQConfig):
        super().__init__(config)
        c = config
        self.encoder = Encoder(c, c.embed_dim)
        self.quantizer = ScalarQuantizer(c.levels)
        self.decoder = Decoder(c, c.embed_dim)
        self.info = TokenizerInfo(
            system="fsq",
            paper="arXiv:2309.15505",
            image_size=c.image_size,
            size_multiple=c.downsample,
            channels=c.in_channels,
            kind="discrete",
            streams=("image",),
            codebook_sizes={"image": math.prod(c.levels)},
            embedding_dim=c.embed_dim,
            max_tokens=(c.image_size // c.downsample) ** 2,
        )

    def forward(self, values: Tensor) -> tuple[Tensor, Quantized]:
        """Values (B, 3, H, W) to their reconstruction and the quantizer's output over (B, h, w, D), for training."""
        quantized = self.quantizer(self.encoder(values).movedim(1, -1))
        return self.decoder(quantized.quantized.movedim(-1, 1)), quantized

    def _encode(self, images: Tensor) -> Tokens:
        features = self.encoder(self.config.to_values(images))
        return Tokens(ids={"image": self.quantizer.encode(to_tokens(features))}, grid=tuple(features.shape[2:]))

    def _decode(self, tokens: Tokens) -> Tensor:
        return self.config.to_images(self.decoder(to_map(self._embed(tokens), tokens.grid)))


PRESETS = {
    "fsq-tiny": Preset(
        FSQTokenizer,
        FSQConfig(image_size=64, channels=16, multipliers=(1, 1, 4, 4), num_blocks=1, attention=(8,), norm_groups=8),
        "small FSQ for the embedded scenes: 64 x 64 images, 64 tokens of 1000 codes",
    ),
}

"""The VQGAN of MAGE (arXiv 2211.09117) and MaskGIT (arXiv 2202.04200): a convolutional autoencoder with a codebook."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from zoo.errors import ZooError
from zoo.nn.autoencoder import AutoencoderConfig, Decoder, Encoder, to_map, to_tokens
from zoo.quantizers import Quantized, codebook_quantizer
from zoo.tokenizer import Preset, Tokenizer, TokenizerInfo, Tokens, Weights


@dataclass(frozen=True)
class VQGANConfig(AutoencoderConfig):
    """Sizes of the VQGAN; the defaults are MAGE's published tokenizer of 16 x 16 tokens."""

    embed_dim: int = 256
    style: str = "mage"
    attention: tuple[int, ...] = ()
    value_range: tuple[float, float] = (0.0, 1.0)
    codebook_size: int = 1024
    commitment: float = 1.0
    """Weight of mean((sg(code) - z)^2)."""
    codebook_weight: float = 0.25
    """Weight of mean((code - sg(z))^2); these two weights are the other way round than in the paper, as published."""
    ema_decay: float = 0.0
    """Codes become running means with this decay, started from data (not published, for training small codebooks); 0:
    learned by gradient, as published."""
    restart_below: float = 0.0
    """Of running means, those whose count in a batch falls below this are restarted from data; 0: never."""

    def __post_init__(self):
        super().__post_init__()
        if self.codebook_size < 1:
            raise ZooError(f"VQGANConfig.codebook_size must be at least 1, got {self.codebook_size}.")


class VQGANTokenizer(Tokenizer):
    """Maps images (B, 3, H, W) to ids on a grid of H/downsample x W/downsample, and back."""

    Config = VQGANConfig

    def __init__(self, config: VQGANConfig):
        super().__init__(config)
        c = config
        self.encoder = Encoder(c, c.embed_dim)
        self.quantizer = codebook_quantizer(
            c.codebook_size, c.embed_dim, c.commitment, c.codebook_weight, c.ema_decay, c.restart_below
        )
        self.decoder = Decoder(c, c.embed_dim)
        self.info = TokenizerInfo(
            system="vqgan",
            paper="arXiv:2211.09117",
            image_size=c.image_size,
            size_multiple=c.downsample,
            channels=c.in_channels,
            kind="discrete",
            streams=("image",),
            codebook_sizes={"image": c.codebook_size},
            embedding_dim=c.embed_dim,
            max_tokens=(c.image_size // c.downsample) ** 2,
        )

    def forward(self, values: Tensor) -> tuple[Tensor, Quantized]:
        """Values (B, 3, H, W) to their reconstruction and the quantizer's output over (B, h, w, D)."""
        quantized = self.quantizer(self.encoder(values).movedim(1, -1))
        return self.decoder(quantized.quantized.movedim(-1, 1)), quantized

    def _encode(self, images: Tensor) -> Tokens:
        features = self.encoder(self.config.to_values(images))
        return Tokens(ids={"image": self.quantizer.encode(to_tokens(features))}, grid=tuple(features.shape[2:]))

    def _decode(self, tokens: Tokens) -> Tensor:
        return self.config.to_images(self.decoder(to_map(self._embed(tokens), tokens.grid)))


PRESETS = {
    "vqgan-f16": Preset(
        VQGANTokenizer,
        VQGANConfig(),
        "VQGAN of MAGE, base of KARL: 256 x 256 images, 256 tokens of 1024 codes",
        Weights(manual="the VQGAN tokenizer that the README of https://github.com/LTH14/mage links to"),
        "MIT",
    ),
    "vqgan-tiny": Preset(
        VQGANTokenizer,
        VQGANConfig(
            image_size=64,
            channels=16,
            multipliers=(1, 1, 4, 4),
            num_blocks=1,
            embed_dim=32,
            norm_groups=8,
            codebook_size=512,
            commitment=0.25,
            ema_decay=0.99,
            restart_below=1.0,
        ),
        "small VQGAN trained on the embedded scenes: 64 x 64 images, 64 tokens of 512 codes",
        Weights("vqgan-tiny.safetensors", "0219b236d8387b431a45d53fe80730ab77b78bb6bbe75ed62a2d39d85c27b909"),
    ),
}

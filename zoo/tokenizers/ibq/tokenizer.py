"""IBQ (arXiv 2412.02692): a convolutional autoencoder with a codebook of any size, by index backpropagation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.nn.autoencoder import AutoencoderConfig, Decoder, Encoder, to_map, to_tokens
from zoo.quantizers import IndexQuantized, IndexQuantizer
from zoo.tokenizer import Preset, Tokenizer, TokenizerInfo, Tokens, Weights


@dataclass(frozen=True)
class IBQConfig(AutoencoderConfig):
    """Sizes of IBQ; the defaults are those of the published tokenizer of 16,384 codes."""

    num_blocks: int = 4
    z_channels: int = 256
    """Channels that the encoder writes and the decoder reads; a 1 x 1 convolution lies between them and the codes."""
    embed_dim: int = 256
    """Width of the codes."""
    codebook_size: int = 16384
    commitment: float = 0.25
    """Weight of mean((code - sg(z))^2), which moves the codes."""
    entropy_temperature: float = 0.01
    """Of the softmax whose entropies are losses; 0: there are none."""
    sample_entropy_weight: float = 1.0
    average_entropy_weight: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        for field in ("z_channels", "codebook_size"):
            if getattr(self, field) < 1:
                raise ZooError(f"IBQConfig.{field} must be at least 1, got {getattr(self, field)}.")


class IBQTokenizer(Tokenizer):
    """Maps images (B, 3, H, W) to ids on a grid of H/downsample x W/downsample, and back."""

    Config = IBQConfig

    def __init__(self, config: IBQConfig):
        super().__init__(config)
        c = config
        self.encoder = Encoder(c, c.z_channels)
        self.quant_conv = nn.Conv2d(c.z_channels, c.embed_dim, 1)
        self.quantizer = IndexQuantizer(
            c.codebook_size,
            c.embed_dim,
            c.commitment,
            c.entropy_temperature,
            c.sample_entropy_weight,
            c.average_entropy_weight,
        )
        self.post_quant_conv = nn.Conv2d(c.embed_dim, c.z_channels, 1)
        self.decoder = Decoder(c, c.z_channels)
        self.info = TokenizerInfo(
            system="ibq",
            paper="arXiv:2412.02692",
            image_size=c.image_size,
            size_multiple=c.downsample,
            channels=c.in_channels,
            kind="discrete",
            streams=("image",),
            codebook_sizes={"image": c.codebook_size},
            embedding_dim=c.embed_dim,
            max_tokens=(c.image_size // c.downsample) ** 2,
        )

    def forward(self, values: Tensor) -> tuple[Tensor, IndexQuantized]:
        """Values (B, 3, H, W) to their reconstruction and the quantizer's output over (B, h, w, D)."""
        quantized = self.quantizer(self.latents(values).movedim(1, -1))
        return self.decode_codes(quantized.quantized.movedim(-1, 1)), quantized

    def latents(self, values: Tensor) -> Tensor:
        """Values (B, 3, H, W) to what is quantised (B, D, h, w)."""
        return self.quant_conv(self.encoder(values))

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Codes (B, D, h, w) to values (B, 3, H, W), not clamped."""
        return self.decoder(self.post_quant_conv(codes))

    def _encode(self, images: Tensor) -> Tokens:
        latents = self.latents(self.config.to_values(images))
        return Tokens(ids={"image": self.quantizer.encode(to_tokens(latents))}, grid=tuple(latents.shape[2:]))

    def _decode(self, tokens: Tokens) -> Tensor:
        return self.config.to_images(self.decode_codes(to_map(self._embed(tokens), tokens.grid)))


def published(codes: int, weights: Weights | None, what: str = "", **sizes) -> Preset:
    """A model of the authors."""
    config = IBQConfig(codebook_size=codes, **sizes)
    tokens, side = (config.image_size // config.downsample) ** 2, config.image_size
    return Preset(IBQTokenizer, config, f"IBQ{what}: {side} x {side} images, {tokens} tokens of {codes} codes", weights)


def hub(name: str, file: str) -> Weights:
    return Weights(f"hf://TencentARC/IBQ-Tokenizer-{name}/{file}.ckpt")


TINY = IBQConfig(
    image_size=64,
    channels=16,
    multipliers=(1, 1, 4, 4),
    num_blocks=1,
    z_channels=64,
    embed_dim=32,
    attention=(8,),
    norm_groups=8,
    codebook_size=1024,
)

PRESETS = {
    f"ibq-{codes}": published(codes, hub(f"{codes}", f"imagenet256_{codes}")) for codes in (1024, 8192, 16384, 262144)
}
PRESETS |= {
    f"ibq-{codes}-pretrain": published(
        codes, hub(f"{codes}-Pretrain", f"IBQ_pretrain_{codes}"), " of about 200 M images"
    )
    for codes in (16384, 262144)
}
PRESETS |= {
    "ett-131072": published(131072, None, ", the tokenizer that ETT tunes", image_size=512, attention=(32,)),
    "ibq-tiny": Preset(
        IBQTokenizer,
        TINY,
        "small IBQ trained on the embedded scenes: 64 x 64 images, 64 tokens of 1024 codes",
        Weights("ibq-tiny.safetensors", "dc177586a1e50740d703fa6fe355faf73c3bc2120590eb9bdb94eed43bd1072a"),
    ),
    "ett-tiny": Preset(
        IBQTokenizer,
        TINY,
        "ibq-tiny tuned by the captions of the embedded scenes: 64 x 64 images, 64 tokens of 1024 codes",
        Weights("ett-tiny.safetensors", "35aeddf4cb8450776c04401e3d31f484294b9bb56bb0e058f71dc47394dcc5d6"),
    ),
}

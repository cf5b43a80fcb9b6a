"""The authors' parameter names and ours: of the tokenizer, and of the parts of Ming-UniVision around its flow head."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from zoo.errors import ZooError
from zoo.tokenizers.mingtok.head import FlowHeadConfig
from zoo.tokenizers.mingtok.tokenizer import MingTokConfig
from zoo.weights import rename

NAMES = {
    "low_level_encoder": "encoder",
    "low_level_encoder.patch_embed.proj": "encoder.patch_embed",
    "low_level_encoder.blocks.0": "encoder.blocks",  # the blocks are one chunk, number 0
    "semantic_decoder.blocks.0": "semantic_decoder.blocks",
    "sem_to_pix": "pixel_decoder.embed",
    "pixel_decoder.blocks.0": "pixel_decoder.blocks",
}
HEAD_NAMES = {
    "model.vis_head": "vis_head",
    "model.diffloss.net": "net",
    "model.diffloss.net.final_layer": "net.output",
    "model.diffloss.net.final_layer.adaLN_modulation": "net.output.modulation",
    "linear_proj": "projector",
}
BLOCK_NAMES = {"in_ln": "norm", "mlp": "mlp", "adaLN_modulation": "modulation"}
MLPS = {"mlp": "mlp", "swiglu": "swiglu", "swiglufused": "swiglu"}


def from_published(state: Mapping[str, Tensor], config: MingTokConfig) -> dict[str, Tensor]:
    """The authors' state dict in our names, without the teacher of their training (`target_backbone`).

    Of a whole Ming-UniVision that is its tokenizer (`vision`).
    """
    if any(name.startswith("vision.") for name in state):
        state = {n.removeprefix("vision."): tensor for n, tensor in state.items() if n.startswith("vision.")}
    state = {name: tensor for name, tensor in state.items() if not name.startswith("target_backbone.")}
    return rename(state, NAMES)


def to_published(state: Mapping[str, Tensor], config: MingTokConfig) -> dict[str, Tensor]:
    """Our state dict in the authors' names."""
    return rename(state, {ours: theirs for theirs, ours in NAMES.items()})


def config_from_published(config: Mapping) -> MingTokConfig:
    """The authors' constructor arguments as our configuration; what they leave out has their default.

    Their losses (`loss_type`, `norm_pix_loss`) belong to training.
    """
    encoder, semantic, pixel = (config[part] for part in ("low_level_encoder", "semantic_decoder", "pixel_decoder"))
    patch, latent = encoder.get("patch_size", 16), encoder["out_dim"]
    if semantic.get("patch_size", 16) != patch or semantic["in_dim"] != latent:
        raise ZooError("low_level_encoder and semantic_decoder must agree on patch_size and on out_dim = in_dim.")
    return MingTokConfig(
        image_size=encoder.get("img_size", 224),
        patch_size=patch,
        latent_dim=latent,
        encoder_width=encoder.get("embed_dim", 1024),
        encoder_depth=encoder.get("depth", 24),
        encoder_mlp=mlp_from_published(encoder),
        semantic_width=semantic.get("embed_dim", 1024),
        semantic_depth=semantic.get("decoder_depth", 1),
        semantic_mlp=mlp_from_published(semantic),
        pixel_patch_size=pixel.get("patch_size", 16),
        pixel_width=pixel.get("embed_dim", 1024),
        pixel_depth=pixel.get("decoder_depth", 1),
        latent_mean=float(config.get("mean", 0)),
        latent_scale=float(config.get("scaling_factor", 1)),
    )


def mlp_from_published(part: Mapping) -> str:
    name = part.get("ffn_layer", "mlp")
    if name not in MLPS:
        raise ZooError(f"ffn_layer must be one of {', '.join(MLPS)}, got {name!r}.")
    return MLPS[name]


def head_names(config: FlowHeadConfig) -> dict[str, str]:
    """{theirs: ours} of the flow head and what is around it."""
    table = dict(HEAD_NAMES)
    for i in range(config.depth):
        prefix = f"model.diffloss.net.res_blocks.{i}"
        table |= {f"{prefix}.{theirs}": f"net.blocks.{i}.{ours}" for theirs, ours in BLOCK_NAMES.items()}
    return table


def head_from_published(state: Mapping[str, Tensor], config: FlowHeadConfig) -> dict[str, Tensor]:
    """The state dict of a FlowHead out of that of Ming-UniVision, whose language model is left out."""
    parts = tuple(f"{part}." for part in ("model.vis_head", "model.diffloss", "linear_proj"))
    return rename({name: t for name, t in state.items() if name.startswith(parts)}, head_names(config))


def head_to_published(state: Mapping[str, Tensor], config: FlowHeadConfig) -> dict[str, Tensor]:
    """The state dict of a FlowHead in the authors' names."""
    return rename(state, {ours: theirs for theirs, ours in head_names(config).items()})


def head_config_from_published(arguments: Mapping) -> FlowHeadConfig:
    """The authors' arguments of RectifiedFlowLoss, and hidden_size, feature_dim and mlp_depth of what is around it."""
    theirs = {
        "target_channels": "latent_dim",
        "z_channels": "condition_dim",
        "depth": "depth",
        "width": "width",
        "mlp_mult": "mlp_ratio",
        "num_sampling_steps": "num_steps",
        "hidden_size": "hidden_size",
        "feature_dim": "feature_dim",
        "mlp_depth": "projector_depth",
    }
    return FlowHeadConfig(**{ours: int(arguments[name]) for name, ours in theirs.items() if name in arguments})

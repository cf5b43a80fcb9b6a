"""The authors' parameter names and ours."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from zoo.tokenizers.dualtoken.tokenizer import DualTokenConfig, PixelDecoderConfig, StreamConfig
from zoo.tokenizers.siglip import published as siglip
from zoo.tokenizers.siglip.encoder import SigLIPConfig
from zoo.weights import rename

NAMES = {
    "prequant_sem": "prequant_semantic",
    "prequant_pix": "prequant_pixel",
    "postquant_sem": "postquant_semantic",
    "postquant_pix": "postquant_pixel",
    "quantizer_sem": "quantizers.semantic",
    "quantizer_pix": "quantizers.pixel",
    "post_quant_conv": "bridge",
}
CODEBOOK_NAMES = {"weight": "codebook", "cluster_size_ema": "cluster_size", "embed_ema": "embed_sum"}
OLD_NAMES = {"semantic": "sem", "pixel": "pix"}
"""Of the authors' earlier checkpoints."""
TOWERS = "siglip_model."


def from_published(state: Mapping[str, Tensor], config: DualTokenConfig) -> dict[str, Tensor]:
    """The authors' state dict in our names, of earlier checkpoints too.

    Their tables end in a row of padding that is never searched, and a shared table is repeated for each level; ours
    have no such row and are there once.
    """
    for old, new in OLD_NAMES.items():
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    towers = {name.removeprefix(TOWERS): t for name, t in state.items() if name.startswith(TOWERS)}
    ours = {f"encoder.{name}": t for name, t in siglip.from_published(towers, config.encoder).items()}
    for name, tensor in rename({n: t for n, t in state.items() if not n.startswith(TOWERS)}, NAMES).items():
        if name.startswith("quantizers."):
            _, stream, _, level, kind = name.split(".")
            if config.streams[stream].shared and level != "0":
                continue
            if kind == "weight":
                tensor = tensor[:-1]
            name = f"quantizers.{stream}.codebooks.{level}.{CODEBOOK_NAMES[kind]}"
        ours[name] = tensor
    return ours


def to_published(state: Mapping[str, Tensor], config: DualTokenConfig) -> dict[str, Tensor]:
    """Our state dict in the authors' names."""
    kinds = {ours: theirs for theirs, ours in CODEBOOK_NAMES.items()}
    towers = {name.removeprefix("encoder."): t for name, t in state.items() if name.startswith("encoder.")}
    theirs = {f"{TOWERS}{name}": t for name, t in siglip.to_published(towers, config.encoder).items()}
    rest = {name: tensor for name, tensor in state.items() if not name.startswith("encoder.")}
    for name, tensor in rename(rest, {ours: theirs for theirs, ours in NAMES.items()}).items():
        if ".codebooks." not in name:
            theirs[name] = tensor
            continue
        quantizer, _, level, kind = name.split(".")
        stream = config.streams[NAMES[quantizer].removeprefix("quantizers.")]
        if kind == "codebook":
            tensor = F.pad(tensor, (0, 0, 0, 1))
        for i in range(stream.levels) if stream.shared else [level]:
            theirs[f"{quantizer}.codebooks.{i}.{kinds[kind]}"] = tensor
    return theirs


def config_from_published(model: Mapping, towers: Mapping) -> DualTokenConfig:
    """The authors' configuration of the model, and that of its SigLIP (vision_config, text_config), as ours."""
    decoder, vision, text = model["ddconfig"], towers["vision_config"], towers["text_config"]
    return DualTokenConfig(
        image_size=vision["image_size"],
        encoder=SigLIPConfig(
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            width=vision["hidden_size"],
            depth=vision["num_hidden_layers"],
            num_heads=vision["num_attention_heads"],
            text_width=text["hidden_size"],
            text_depth=text["num_hidden_layers"],
            text_heads=text["num_attention_heads"],
            mlp_ratio=(vision["intermediate_size"] + 0.5) / vision["hidden_size"],  # rounded down where it is used
            text_length=text["max_position_embeddings"],
            vocab_size=text["vocab_size"],
        ),
        layer_pixel=model["layer_recon"],
        layer_shortcut=model["layer_shortcut"] or 0,
        shortcut_weight=model["weight_shortcut"] or 0.0,
        layer_semantic=model["layer_sem"],
        embed_dim=model["vq_pix"]["embed_dim"],
        semantic=stream_from_published(model["vq_sem"]),
        pixel=stream_from_published(model["vq_pix"]),
        decoder=PixelDecoderConfig(
            image_size=decoder["resolution"],
            in_channels=decoder["out_ch"],
            channels=decoder["ch"],
            multipliers=tuple(decoder["ch_mult"]),
            num_blocks=decoder["num_res_blocks"],
            embed_dim=decoder["decoder_in_channels"],
            attention=tuple(decoder["attn_resolutions"]),
            latent_size=model["decoder_latent_shape"][0] if model["decoder_latent_shape"] else 0,
        ),
    )


def stream_from_published(quantizer: Mapping) -> StreamConfig:
    size, decay = (tuple(v) if isinstance(v, list) else v for v in (quantizer["n_embed"], quantizer["decay"]))
    return StreamConfig(
        codebook_size=size,
        levels=quantizer["code_shape"][2],
        decay=decay,
        kind=quantizer["bottleneck_type"],
        shared=quantizer["shared_codebook"],
        restart=quantizer["restart_unused_codes"],
    )

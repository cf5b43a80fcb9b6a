"""Parameter names of transformers' SiglipModel, in which the weights are published, and ours."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from zoo.tokenizers.siglip.encoder import SigLIPConfig
from zoo.weights import rename

NAMES = {
    "vision_model.embeddings.patch_embedding": "vision.patch_embed.proj",
    "vision_model.embeddings.position_embedding.weight": "vision.pos_embed",
    "vision_model.post_layernorm": "vision.norm",
    "vision_model.head.probe": "vision.attn_pool.latent",
    "vision_model.head.attention": "vision.attn_pool",
    "vision_model.head.attention.out_proj": "vision.attn_pool.proj",
    "vision_model.head.layernorm": "vision.attn_pool.norm",
    "vision_model.head.mlp": "vision.attn_pool.mlp",
    "text_model.embeddings.token_embedding": "text.token_embed",
    "text_model.embeddings.position_embedding.weight": "text.pos_embed",
    "text_model.final_layer_norm": "text.norm",
    "text_model.head": "text.head",
}
LAYER_NAMES = {
    "layer_norm1": "norm1",
    "self_attn": "attn",
    "self_attn.out_proj": "attn.proj",
    "layer_norm2": "norm2",
    "mlp": "mlp",
}
POOL = "vision_model.head.attention"
KINDS = ("weight", "bias")


def layers(config: SigLIPConfig) -> dict[str, str]:
    """{theirs: ours} of every layer of both towers."""
    return {
        f"{tower}_model.encoder.layers.{i}": f"{tower}.blocks.{i}"
        for tower, depth in (("vision", config.depth), ("text", config.text_depth))
        for i in range(depth)
    }


def names(config: SigLIPConfig) -> dict[str, str]:
    """{theirs: ours}, once queries, keys and values are packed as ours are."""
    return NAMES | {
        f"{theirs}.{a}": f"{ours}.{b}" for theirs, ours in layers(config).items() for a, b in LAYER_NAMES.items()
    }


def from_published(state: Mapping[str, Tensor], config: SigLIPConfig) -> dict[str, Tensor]:
    """A state dict of SiglipModel, or of one of its towers, in our names."""
    state = dict(state)
    for kind in KINDS:
        for layer in layers(config):
            parts = [f"{layer}.self_attn.{part}_proj.{kind}" for part in "qkv"]
            if state.keys() >= set(parts):
                state[f"{layer}.self_attn.qkv.{kind}"] = torch.cat([state.pop(part) for part in parts])
        if (packed := f"{POOL}.in_proj_{kind}") in state:
            q, k, v = state.pop(packed).chunk(3)
            state[f"{POOL}.q.{kind}"], state[f"{POOL}.kv.{kind}"] = q, torch.cat([k, v])
    ours = rename(state, names(config))
    if "vision.pos_embed" in ours:
        ours["vision.pos_embed"] = ours["vision.pos_embed"][None]
    return ours


def to_published(state: Mapping[str, Tensor], config: SigLIPConfig) -> dict[str, Tensor]:
    """Our state dict in the names of SiglipModel."""
    state = {name: tensor[0] if name == "vision.pos_embed" else tensor for name, tensor in state.items()}
    theirs = rename(state, {ours: theirs for theirs, ours in names(config).items()})
    for kind in KINDS:
        for layer in layers(config):
            q, k, v = theirs.pop(f"{layer}.self_attn.qkv.{kind}").chunk(3)
            theirs |= {f"{layer}.self_attn.{part}_proj.{kind}": one for part, one in zip("qkv", (q, k, v), strict=True)}
        theirs[f"{POOL}.in_proj_{kind}"] = torch.cat([theirs.pop(f"{POOL}.{part}.{kind}") for part in ("q", "kv")])
    return theirs

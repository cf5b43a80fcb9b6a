"""The authors' parameter names and configuration, and ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.tokenizers.seed.qformer import QFormerConfig
from zoo.tokenizers.seed.tokenizer import EVAConfig, HeadConfig, SeedConfig
from zoo.weights import rename

NAMES = {
    "visual_encoder": "encoder",
    "ln_vision": "encoder_norm",
    "quantize.embedding.weight": "quantizer.codebook",
    "encode_task_layer": "encode_task",
    "decode_task_layer": "decode_task",
    "image_down": "head.down",
    "distill_image_proj": "head.proj",
    "reverse_tokens": "head.queries",
    "vision_proj": "image_proj",
    "temp": "temperature",
}
QFORMERS = {"Qformer.bert": "qformer", "Reverse_Qformer.bert": "head.qformer"}
EMBEDDING_NAMES = {
    "embeddings.word_embeddings": "token_embed",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.LayerNorm": "norm",
}
LAYER_NAMES = {
    **{
        f"{theirs}.{a}": f"{ours}.{b}"
        for theirs, ours in (("attention", "attn"), ("crossattention", "cross_attn"))
        for a, b in {
            "self.query": "q",
            "self.key": "k",
            "self.value": "v",
            "output.dense": "proj",
            "output.LayerNorm": "norm",
        }.items()
    },
    **{
        f"{a}{suffix}.{b}": f"{ours}.{c}"
        for suffix, ours in (("_query", "query_mlp"), ("", "text_mlp"))
        for a, b, c in (
            ("intermediate", "dense", "fc1"),
            ("output", "dense", "fc2"),
            ("output", "LayerNorm", "norm"),
        )
    },
}
UNUSED = (
    "Qformer.cls.",
    "Qformer.bert.embeddings.position_ids",
    "Reverse_Qformer.bert.embeddings.position_ids",
    "itm_head.",
)
"""Of a captioning head that no stage trains, and numbers 0, 1, ...; of BLIP-2's matching head."""
TEXT_SIDE = ("qformer.token_embed.", "qformer.pos_embed.", "text_proj.", "image_proj.", "temperature")


def names(config: SeedConfig) -> dict[str, str]:
    """{theirs: ours}."""
    table = dict(NAMES)
    for theirs, ours in QFORMERS.items():
        table |= {f"{theirs}.{a}": f"{ours}.{b}" for a, b in EMBEDDING_NAMES.items()}
        for i in range(config.qformer.depth if ours == "qformer" else config.head.depth):
            table |= {f"{theirs}.encoder.layer.{i}.{a}": f"{ours}.layers.{i}.{b}" for a, b in LAYER_NAMES.items()}
    return table


def fields_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fields of the configuration that a file decides by what is in it, for Registry.load.

    Released weights end in an MLP and published training code in a Reverse Q-Former; the branch that gives queries back
    may be left out, and a text side is there after the first stage.
    """
    depth = 1 + max(
        (int(found[1]) for name in state if (found := re.match(r"Reverse_Qformer\D+(\d+)\.", name))), default=-1
    )
    words = state.get("Qformer.bert.embeddings.word_embeddings.weight")
    has_text = words is not None and all(
        any(name.startswith(start) for name in state) for start in ("text_proj.", "vision_proj.", "temp")
    )
    head: dict[str, Any] = {"kind": "qformer", "depth": depth} if depth else {"kind": "mlp"}
    return {
        "retrieval": any(name.startswith("blocks.") for name in state),
        "head": head,
        "qformer": {"vocab_size": len(words) if has_text else 0},
    }


def from_published(state: Mapping[str, Tensor], config: SeedConfig) -> dict[str, Tensor]:
    """The authors' state dict in our names, without what nothing reads. Half precision becomes float32."""
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(UNUSED)}
    ours = rename(kept, names(config))
    if not config.qformer.vocab_size:
        ours = {n: t for n, t in ours.items() if not n.startswith(TEXT_SIDE) and ".text_mlp." not in n}
    return {name: tensor.float() for name, tensor in ours.items()}


def to_published(state: Mapping[str, Tensor], config: SeedConfig) -> dict[str, Tensor]:
    """Our state dict in the authors' names."""
    theirs = rename(state, {ours: theirs for theirs, ours in names(config).items()})
    positions = torch.arange(config.qformer.max_positions)[None]
    for qformer, ours in QFORMERS.items():
        if any(name.startswith(f"{ours}.") for name in state):
            theirs[f"{qformer}.embeddings.position_ids"] = positions
    return theirs


def config_from_published(model: Mapping) -> SeedConfig:
    """The authors' sizes of a tokenizer, or of a model of either stage, as ours."""
    vit, bert, kind = model["vit"], model["bert"], model["class"]
    if bert["hidden_dropout_prob"] != bert["attention_probs_dropout_prob"]:
        raise ZooError("hidden_dropout_prob and attention_probs_dropout_prob must be the same here.")
    head = HeadConfig(dim=model["image_features_dim"])
    if model.get("use_qformer_image"):
        depth = 4 if kind == "Blip2QformerCodebookAllImage" else bert["num_hidden_layers"]
        head = HeadConfig("qformer", model["image_features_dim"], depth=depth)
    return SeedConfig(
        image_size=model["img_size"],
        encoder=EVAConfig(
            **{name: vit[name] for name in ("patch_size", "depth", "num_heads", "mlp_ratio")}, width=vit["embed_dim"]
        ),
        qformer=QFormerConfig(
            num_queries=model["num_query_token"],
            width=bert["hidden_size"],
            depth=bert["num_hidden_layers"],
            num_heads=bert["num_attention_heads"],
            hidden=bert["intermediate_size"],
            cross_every=model.get("cross_attention_freq", 2),
            dropout=bert["hidden_dropout_prob"],
            vocab_size=bert["vocab_size"] if kind == "Blip2QformerCasual" else 0,
            max_positions=bert["max_position_embeddings"],
        ),
        codebook_size=model["n_embed"],
        embed_dim=model["codebook_embed_dim"],
        decoder_depth=model["decode_depth"],
        head=head,
        text_dim=model.get("embed_dim", 256),
        text_length=model.get("max_txt_len", min(32, bert["max_position_embeddings"])),
    )

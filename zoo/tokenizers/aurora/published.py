"""The authors' parameter names and constructor arguments, and ours."""

from collections.abc import Mapping

import torch
from torch import Tensor

from zoo.tokenizers.aurora.tokenizer import AuroraConfig
from zoo.weights import rename

NAMES = {
    "_vq_vae._embedding": "quantizer.codebook",
    "_vq_vae._ema_cluster_size": "quantizer.cluster_size",
    "_vq_vae._ema_w": "quantizer.embed_sum",
}


def from_published(state: Mapping[str, Tensor], config: AuroraConfig) -> dict[str, Tensor]:
    """The authors' state dict in our names.

    Their loader drops a stray `codebook.weight`. A file for inference may lack the running sums: they become those of
    a codebook in which each code was seen once.
    """
    state = rename({name: tensor for name, tensor in state.items() if name != "codebook.weight"}, NAMES)
    if "quantizer.codebook" in state:
        codebook = state["quantizer.codebook"]
        state.setdefault("quantizer.embed_sum", codebook.clone())
        state.setdefault("quantizer.cluster_size", torch.ones(len(codebook)))
    return state


def to_published(state: Mapping[str, Tensor], config: AuroraConfig) -> dict[str, Tensor]:
    """Our state dict in the authors' names."""
    return rename(state, {ours: theirs for theirs, ours in NAMES.items()})


def config_from_published(arguments: Mapping) -> AuroraConfig:
    """The authors' constructor arguments as our configuration; those that have no effect there are left out here."""
    a = {"use_norm": True, "max_value": 1.0, "image_size": 256, "num_tokens": 512, "codebook_dim": 512} | arguments
    return AuroraConfig(
        image_size=a["image_size"],
        channels=a.get("channels", 1),
        hidden_dim=a.get("hidden_dim", 16),
        downsample=a.get("downsample_ratio", 16),
        num_blocks=a.get("num_resnet_blocks", 2),
        block=a.get("residul_type", "v1"),
        objective=a.get("train_objective", "regression"),
        codebook_size=a["num_tokens"],
        codebook_dim=a["codebook_dim"],
        ema_decay=a.get("ema_decay", 0.99),
        commitment=a.get("commitment_cost", 0.25),
        value_range=(0.0, a["max_value"]) if a["use_norm"] else (-1.0, 1.0),
        max_value=a["max_value"] if a["use_norm"] else 0.0,
    )

"""The authors' parameter names and ours."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

from torch import Tensor

from zoo.errors import ZooError
from zoo.tokenizers.ibq.tokenizer import IBQConfig
from zoo.weights import rename

NAMES = {"quantize.embedding.weight": "quantizer.codebook"}
AVERAGES = "model_ema."


def from_published(state: Mapping[str, Tensor], config: IBQConfig) -> dict[str, Tensor]:
    """The authors' state dict in our names, without the losses (discriminator, perceptual network) a file carries.

    Weights are the averages in the file, which published numbers are of; where it has none, the last ones, with a
    warning. Raises ZooError for a codebook of another size, and where the average of a weight is missing.
    """
    plain = {name: tensor for name, tensor in state.items() if not name.startswith(("loss.", AVERAGES))}
    averages = {name: tensor for name, tensor in state.items() if name.startswith(AVERAGES)}
    codebook = plain.get("quantize.embedding.weight")
    if codebook is not None and len(codebook) != config.codebook_size:
        raise ZooError(
            f"this file holds IBQ with {len(codebook)} codes, and the configuration has {config.codebook_size}; load "
            f"it under a name with {len(codebook)} in it, or with codebook_size={len(codebook)}."
        )
    if averages:
        names = averaged_names(plain)
        if missing := sorted(name for name, average in names.items() if average not in averages):
            raise ZooError(f"this file has averages of weights, but none of {len(missing)}, {missing[0]} among them.")
        plain = {name: averages[average] for name, average in names.items()}
    else:
        warnings.warn("this file has no averages of weights (model_ema.*); its last weights are loaded.", stacklevel=2)
    return rename(plain, NAMES)


def to_published(state: Mapping[str, Tensor], config: IBQConfig) -> dict[str, Tensor]:
    """Our state dict in the authors' names, without averages."""
    return rename(state, {ours: theirs for theirs, ours in NAMES.items()})


def averaged_names(names: Iterable[str]) -> dict[str, str]:
    """{name: what the average of that weight is called}: the same without dots, so that it cannot be parsed back."""
    return {name: AVERAGES + name.replace(".", "") for name in names}


def config_from_published(config: Mapping) -> IBQConfig:
    """The authors' constructor arguments as our configuration."""
    sizes = config["ddconfig"]
    return IBQConfig(
        image_size=sizes["resolution"],
        in_channels=sizes["in_channels"],
        channels=sizes["ch"],
        multipliers=tuple(sizes["ch_mult"]),
        num_blocks=sizes["num_res_blocks"],
        z_channels=sizes["z_channels"],
        embed_dim=config["embed_dim"],
        attention=tuple(sizes["attn_resolutions"]),
        codebook_size=config["n_embed"],
        commitment=config["beta"],
        entropy_temperature=config["entropy_temperature"] if config["use_entropy_loss"] else 0.0,
        sample_entropy_weight=config["sample_minimization_weight"],
        average_entropy_weight=config["batch_maximization_weight"],
    )

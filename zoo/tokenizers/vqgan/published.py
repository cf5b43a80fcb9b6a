"""The authors' parameter names and ours."""

from collections.abc import Mapping

from torch import Tensor

from zoo.tokenizers.vqgan.tokenizer import VQGANConfig
from zoo.weights import rename

NAMES = {"quantize.embedding.weight": "quantizer.codebook"}


def from_published(state: Mapping[str, Tensor], config: VQGANConfig) -> dict[str, Tensor]:
    """The authors' state dict in our names, without the loss (discriminator, perceptual network) a file may carry."""
    return rename({name: tensor for name, tensor in state.items() if not name.startswith("loss.")}, NAMES)


def to_published(state: Mapping[str, Tensor], config: VQGANConfig) -> dict[str, Tensor]:
    """Our state dict in the authors' names."""
    return rename(state, {ours: theirs for theirs, ours in NAMES.items()})

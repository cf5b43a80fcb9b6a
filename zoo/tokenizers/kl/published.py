"""The authors' parameter names, which are ours."""

from collections.abc import Mapping

from torch import Tensor

from zoo.tokenizers.kl.tokenizer import KLConfig


def from_published(state: Mapping[str, Tensor], config: KLConfig) -> dict[str, Tensor]:
    """The authors' state dict without the loss (discriminator, perceptual network) that a file may carry."""
    return {name: tensor for name, tensor in state.items() if not name.startswith("loss.")}


def to_published(state: Mapping[str, Tensor], config: KLConfig) -> dict[str, Tensor]:
    """Our state dict in the authors' names."""
    return dict(state)

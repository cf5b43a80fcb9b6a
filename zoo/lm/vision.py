"""The visual side of a language model: what every kind of it says of itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from zoo import registry
from zoo.errors import ZooError
from zoo.tokenizer import Tokenizer, Tokens
from zoo.vocabulary import Stream

if TYPE_CHECKING:
    from zoo.lm.model import VisualLM

TOKENIZER_FILE = "visual_tokenizer.safetensors"

Generators = torch.Generator | Sequence[torch.Generator] | None
"""Of random numbers for some images: one for all, one for each, or torch's global one."""


class Seen(NamedTuple):
    """B images as a language model reads them."""

    tokens: Tokens
    """What of each image stands in a sequence of ids, on the CPU: its streams are those of the vocabulary."""
    inputs: Tensor | None = None
    """(B, N, hidden_size): read in place of the embedded words of these tokens; None: the words themselves are."""
    latents: Tensor | None = None
    """(B, N, C): what is written in place of these words; None: the words themselves are."""

    def rows(self, index: slice) -> Seen:
        """Some of the images."""
        return Seen(*(None if part is None else part[index] for part in self))

    @staticmethod
    def cat(parts: Sequence[Seen]) -> Seen:
        """The images of all, which have as many positions each."""
        tokens, inputs, latents = zip(*parts, strict=True)
        ids = {name: torch.cat([one.ids[name] for one in tokens]) for name in tokens[0].ids}
        joined = (None if rows[0] is None else torch.cat(rows) for rows in (inputs, latents))
        return Seen(Tokens(ids, mask=torch.cat([one.mask for one in tokens])), *joined)


class GeneratedImages(NamedTuple):
    """Pictures, and what was written for them."""

    images: Tensor
    """(B, C, H, W) in [0, 1]."""
    tokens: Tokens
    """Ids or normalised latents, as the tokenizer's encode gives them."""


class Writer(Protocol):
    """Writes some images at once, a token of each after the other, behind the word that begins an image."""

    length: int
    """How many are written."""

    def write(self, output: CausalLMOutputWithPast) -> Tensor:
        """The next token of each image, from what the model says at the last position of each of its rows (copies * B);
        returns what it reads next, (copies * B, 1, hidden_size)."""

    def finish(self) -> GeneratedImages:
        """The images, when all is written."""


class Vision(nn.Module):
    """A frozen tokenizer of images, its words, and how a language model reads and writes images through it."""

    kind: ClassVar[str]
    """What is written for an image: names its loss ("KIND_loss") and the weight of it."""
    FILE: ClassVar[str]
    """By which a folder of VisualLM.save says which kind it holds."""
    spoken: ClassVar[bool]
    """True: the words of an image are the tokens, which the model learns and says as it does those of a text. False:
    they only hold their places, and `loss` is what is learned there."""
    text_scale: ClassVar[float] = 1.0
    """Guidance of generate_image, unless another is asked for."""
    image_scale: ClassVar[float] = 1.0

    unembedded: ClassVar[int] = 0
    """How many of the last words only hold places, so that the language model needs no rows for them."""
    top_p: ClassVar[float | None] = None
    """Of generate_image, likewise; None: nothing is drawn."""

    streams: tuple[Stream, ...]
    """The words of images, in the order in which they stand in a sequence."""
    length: int
    """Positions of an image in each stream, at the most."""
    settings: dict[str, int]
    """Of the tokenizer's encode."""
    num_tokens: int | None
    """Of each image, of a tokenizer of variable length; None: all, or as many as it takes."""
    obstacle: str = ""
    """Why no image can be written, where that is so."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        self.length = tokenizer.info.max_tokens

    def standing(self, written: bool) -> tuple[Stream, ...]:
        """Those streams that stand in a sequence for an image that is written, or read; in their order."""
        return self.streams

    def shown(self, tokens: Tokens, written: bool) -> Tokens:
        """The part of an image that stands in a sequence."""
        return Tokens({stream.name: tokens.ids[stream.name] for stream in self.standing(written)}, mask=tokens.mask)

    def words_of(self, written: bool) -> int:
        """Words of an image in a sequence, at the most."""
        return sum(self.length * stream.levels + 2 for stream in self.standing(written))

    def train(self, mode: bool = True) -> Vision:
        super().train(mode)
        self.tokenizer.eval()
        return self

    def check(self, hidden_size: int) -> None:
        """Raise ZooError where this does not fit a language model of that width."""

    def see(self, images: Tensor) -> Seen:
        """Images (B, C, H, W) in [0, 1], which are not checked again; see tokenizer.check_images."""
        return self.project(self.perceive(images))

    def perceive(self, images: Tensor) -> Seen:
        """What the frozen tokenizer makes of them: what the model reads is not projected yet."""
        return self.read(self.encode(images))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tokens:
        """Images (B, C, H, W) in [0, 1], not checked again, to as many tokens each."""
        # ids are exact whatever the precision of the training around them
        with torch.autocast(images.device.type, enabled=False):
            return self.tokenizer._encode(images.to(self.tokenizer.dtype), **self.settings)

    def read(self, tokens: Tokens) -> Seen:
        """The same of tokens as `encode` gives them, on the device; see check_tokens."""
        raise NotImplementedError

    def check_tokens(self, tokens: Tokens) -> Tokens:
        """Tokens that were encoded before, on the tokenizer's device. Raises ZooError where `encode` gives others."""
        tokens = self.tokenizer.check_tokens(tokens, self.tokenizer.info.streams)
        if self.num_tokens is not None and (wrong := tokens.lengths != self.num_tokens).any():
            raise ZooError(
                f"an image has {tokens.lengths[wrong][0]} tokens and the model reads {self.num_tokens} of each; write "
                f"them with `zoo pretokenize encode.num_tokens={self.num_tokens}`."
            )
        return tokens

    def project(self, seen: Seen) -> Seen:
        """The second half of `see`, with what is learned."""
        return seen

    def reconstruct(self, images: Tensor) -> Tensor:
        """What the tokenizer makes of images (B, C, H, W) in [0, 1] from the tokens that are read of them."""
        return self.tokenizer.reconstruct(images)

    def draws(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """The random numbers that `loss` takes for some images, (count, N, ...) each."""
        return ()

    def loss(self, hidden: Tensor, latents: Tensor, *draws: Tensor) -> Tensor:
        """Errors (n,) of latents (n, C) after the hidden states (n, hidden_size) before them, where not spoken."""
        raise NotImplementedError

    def writer(self, model: VisualLM, count: int, copies: int, generator: Generators, **settings) -> Writer:
        """Of `count` images, each read in `copies` rows of guidance: with its condition, without any, and with its
        images alone; settings are those of generate_image. Raises ZooError for what has no meaning here."""
        raise NotImplementedError

    def save(self, folder: Path, about: dict) -> None:
        """Write FILE, which has `about` in it, and the tokenizer."""
        registry.save(self.tokenizer, folder / TOKENIZER_FILE)

    @classmethod
    def load(cls, folder: Path) -> tuple[Vision, dict]:
        """What `save` wrote. Raises ZooError for anything else."""
        raise NotImplementedError


def patches(count: int, length: int) -> Tokens:
    """What stands in a sequence for images of so many places, where their words only hold these."""
    return Tokens(ids={"image": torch.zeros(count, length, dtype=torch.int64)})


def drawn(draw: Callable, shape: tuple[int, ...], generator: Generators, device: torch.device) -> Tensor:
    """Random numbers (B, ...) by torch.rand or torch.randn; those of an image by its own generator, if it has one."""
    if isinstance(generator, (list, tuple)):
        return torch.stack([draw(shape[1:], device=g.device, generator=g) for g in generator]).to(device)
    return draw(shape, device=generator.device if generator else device, generator=generator).to(device)

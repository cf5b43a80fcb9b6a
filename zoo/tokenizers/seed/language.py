"""Images as words of SEED-LLaMA (arXiv 2310.01218), and how it is asked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from zoo.vocabulary import Stream, Vocabulary, integers

TEXT_SIZE, NUM_CODES, LENGTH = 32000, 8192, 32
"""Words of LLaMA, codes of the codebook, and codes of an image."""


def seed_streams(num_codes: int = NUM_CODES) -> list[Stream]:
    """The words of images: <img_00000>, ..., and behind them <img> and </img>, which stand around an image."""
    return [Stream("image", num_codes, "<img_{:05d}>", begin="<img>", end="</img>", marks_first=False)]


def seed_vocabulary(text_size: int = TEXT_SIZE, num_codes: int = NUM_CODES) -> Vocabulary:
    """The words that SEED-LLaMA adds to LLaMA's 32,000: code c is 32000 + c, <img> is 40192 and </img> 40193."""
    return Vocabulary(text_size, seed_streams(num_codes))


def ids_to_text(ids: Tensor | Sequence[int], num_codes: int = NUM_CODES) -> str:
    """The ids of one image to "<img><img_00017>...</img>". Raises ZooError for one beyond the codebook."""
    return seed_streams(num_codes)[0].to_text(integers(ids, 0, num_codes, "ids of an image"))


def text_to_ids(text: str, length: int = LENGTH, num_codes: int = NUM_CODES) -> Tensor:
    """All images in a text, (n, length) int64, n being 0 where there is none. Blanks between words are ignored.

    Raises ZooError for an image without its end, of another length, with an id beyond the codebook or with anything
    else in it: nothing is repaired silently.
    """
    return _stacked(seed_streams(num_codes)[0].from_text(text, length), length)


def images_in(ids: Tensor | Sequence[int], vocabulary: Vocabulary, length: int = LENGTH) -> Tensor:
    """All images in ids (T,) of a language model, (n, length) int64, as text_to_ids finds them in its text."""
    return _stacked(vocabulary.images_in(ids, "image", length), length)


def prompt(question: str, images: Sequence[Tensor | Sequence[int]] = ()) -> str:
    """How the model on Vicuna ("8B") is asked, images given by their ids before the question.

    It begins with LLaMA's word for the beginning of a text, which a text tokenizer must not add again.
    """
    return f"<s>USER: {''.join(map(ids_to_text, images))}{question}\nASSISTANT:"


def _stacked(images: Iterable[Tensor], length: int) -> Tensor:
    found = list(images)
    return torch.stack(found) if found else torch.empty(0, length, dtype=torch.int64)

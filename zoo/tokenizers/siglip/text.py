"""Texts to ids, of the fixed length that the text tower reads."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.errors import ZooError

PAD, UNKNOWN = "<pad>", "<unk>"


def words(text: str) -> list[str]:
    """Lower-cased words and punctuation marks, in their order."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


class WordTokenizer:
    """Ids are places in a vocabulary of words that begins with PAD and UNKNOWN."""

    def __init__(self, vocabulary: Sequence[str], length: int):
        self.ids, self.length = {word: i for i, word in enumerate(vocabulary)}, length

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(B, length) int64. Raises ZooError for a text of more words."""
        rows = [[self.ids.get(word, self.ids[UNKNOWN]) for word in words(text)] for text in texts]
        check_lengths(texts, rows, self.length)
        return torch.tensor([row + [self.ids[PAD]] * (self.length - len(row)) for row in rows])


class HubTokenizer:
    """The tokenizer of transformers behind a hub id or in a local folder. Raises ZooError when it is not there."""

    def __init__(self, name: str, length: int):
        from transformers import AutoTokenizer

        try:
            self.tokenizer, self.length = AutoTokenizer.from_pretrained(name), length
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ZooError(
                f"the text tokenizer '{name}' is not on this machine and cannot be downloaded ({reason}); fetch the "
                "tokenizer files of that id where there is a network and pass text_tokenizer='path/to/their/folder'."
            ) from error

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(B, length) int64, of lower-cased text as in training. Raises ZooError for a text of more tokens."""
        rows = self.tokenizer([text.lower() for text in texts])["input_ids"]
        check_lengths(texts, rows, self.length)
        pad = self.tokenizer.pad_token_id
        return torch.tensor([row + [pad] * (self.length - len(row)) for row in rows])


def check_lengths(texts: Sequence[str], rows: Sequence[Sequence[int]], limit: int) -> None:
    """Raise ZooError for the first text whose ids are more than the tower reads."""
    for text, row in zip(texts, rows, strict=True):
        if len(row) > limit:
            raise ZooError(f"a text of {len(row)} tokens is longer than the {limit} that are read: '{text[:60]}...'.")

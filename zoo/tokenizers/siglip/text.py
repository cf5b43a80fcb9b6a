"""Texts to ids, of the fixed length that the text tower reads."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.hub import pinned

PAD, UNKNOWN, BEGIN = "<pad>", "<unk>", "<cls>"


def words(text: str) -> list[str]:
    """Lower-cased words and punctuation marks, in their order."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def contradict(text: str, alternatives: Sequence[Sequence[str]], draws: Sequence[float]) -> str | None:
    """The text with one of its words replaced by another one of the same list, so that it is not true any more.

    Args:
        text: case is ignored.
        alternatives: lists of words, or phrases, of which at most one is true where it stands. Those of a list of one
            are never replaced, and no word in them is.
        draws: three numbers in [0, 1) that choose the list (in the order of the text), the place and the new word.

    Returns None for a text without any such word.
    """
    list_of = {word: tuple(words) for words in alternatives for word in words}
    longest_first = "|".join(map(re.escape, sorted(list_of, key=len, reverse=True)))
    places: dict[tuple[str, ...], list[re.Match]] = {}
    for place in re.finditer(rf"\b({longest_first})\b", text, re.IGNORECASE):
        if len(words := list_of[place[0].lower()]) > 1:
            places.setdefault(words, []).append(place)
    if not places:
        return None
    choose = lambda options, draw: options[int(draw * len(options))]  # noqa: E731
    words = choose(list(places), draws[0])
    place = choose(places[words], draws[1])
    other = choose([word for word in words if word != place[0].lower()], draws[2])
    return text[: place.start()] + other + text[place.end() :]


class WordTokenizer:
    """Ids are places in a vocabulary of words that begins with PAD and UNKNOWN. Texts begin with BEGIN if it has it."""

    def __init__(self, vocabulary: Sequence[str], length: int):
        self.ids, self.length = {word: i for i, word in enumerate(vocabulary)}, length
        self.pad, self.begin = self.ids[PAD], [self.ids[BEGIN]] if BEGIN in self.ids else []

    def __call__(self, texts: Sequence[str], truncate: bool = False) -> Tensor:
        """(B, length) int64. A text of more words raises ZooError, or loses the last ones."""
        rows = [self.begin + [self.ids.get(word, self.ids[UNKNOWN]) for word in words(text)] for text in texts]
        return padded([row[: self.length] for row in rows] if truncate else rows, texts, self.length, self.pad)


class HubTokenizer:
    """The tokenizer of transformers behind a hub id or in a local folder. Raises ZooError when it is not there."""

    def __init__(self, name: str, length: int):
        from transformers import AutoTokenizer

        try:
            name, revision = pinned(name)
            self.tokenizer, self.length = AutoTokenizer.from_pretrained(name, **revision), length
            self.pad = self.tokenizer.pad_token_id
        except OSError as error:
            raise ZooError(
                f"the text tokenizer '{name}' is not on this machine and cannot be downloaded ({_first_line(error)}); "
                "fetch its files where there is a network and pass text_tokenizer='path/to/their/folder'."
            ) from error
        except (ImportError, ValueError) as error:
            raise ZooError(
                f"the text tokenizer '{name}' cannot be read ({_first_line(error)}); SentencePiece files, as of SigLIP "
                "1, need the package sentencepiece."
            ) from error

    def __call__(self, texts: Sequence[str], truncate: bool = False) -> Tensor:
        """(B, length) int64 of lower-cased texts, as trained on. One of more tokens raises ZooError, or is cut."""
        cut = {"truncation": True, "max_length": self.length} if truncate else {}
        rows = self.tokenizer([text.lower() for text in texts], **cut)["input_ids"]
        return padded(rows, texts, self.length, self.pad)


def padded(rows: Sequence[list[int]], texts: Sequence[str], length: int, pad: int) -> Tensor:
    """(B, length) int64, padded at the end. Raises ZooError for the first text with more ids."""
    for text, row in zip(texts, rows, strict=True):
        if len(row) > length:
            raise ZooError(f"a text of {len(row)} tokens is longer than the {length} that are read: '{text[:60]}...'.")
    return torch.tensor([row + [pad] * (length - len(row)) for row in rows])


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]

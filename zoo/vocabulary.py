"""One id space for the words of a language model and the codes of any number of visual streams."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.errors import ZooError, expect_integer, nearest, one_line, shortened
from zoo.tokenizer import Tokens, is_plain

WORD = re.compile(r"[^{}]*(\{(:0?\d?d)?\})?[^{}]*")


@dataclass(frozen=True)
class Stream:
    """The words of one visual stream, a contiguous range of ids.

    name: as in Tokens.ids; size: codes of its codebook; word: template of a code's word, such as "<DEPTH_{}>" or
    "<img_{:05d}>". levels: ids per position of a residual stream; each level has a range of `size` words of its own,
    and its word numbers go on from the level before. begin, end: words around an image, or None. marks_first: begin
    and end come before the codes (AURORA) or after them (SEED).
    """

    name: str
    size: int
    word: str
    levels: int = 1
    begin: str | None = None
    end: str | None = None
    marks_first: bool = True

    def __post_init__(self):
        if not (isinstance(self.name, str) and isinstance(self.word, str) and WORD.fullmatch(self.word)):
            raise ZooError(
                f"a stream has a name and the template of a word with {{}} at most once, such as <img_{{:05d}}>, got "
                f"{shortened(self.name)} and {shortened(self.word)}."
            )
        for name in ("size", "levels"):
            expect_integer(f"{name} of stream '{self.name}'", getattr(self, name), 1, 2**31)
        if not all(mark is None or isinstance(mark, str) for mark in (self.begin, self.end)):
            raise ZooError(f"begin and end of stream '{self.name}' are words, or None.")

    def words(self) -> list[str]:
        marks = [mark for mark in (self.begin, self.end) if mark]
        codes = [self.word.format(i) for i in range(self.size * self.levels)]
        return marks + codes if self.marks_first else codes + marks

    def to_text(self, codes: Tensor | Sequence[int]) -> str:
        """Codes (N,), of a residual stream (N, levels), of one image to its words in a row, with those around it.

        Codes may also be a grid; their range is not checked.
        """
        codes = integers(codes, -(2**63), 2**63 - 1, f"codes of stream '{self.name}'", self.levels)
        if self.levels > 1:
            codes = codes + self.size * torch.arange(self.levels, device=codes.device)
        words = (self.word.format(number) for number in codes.flatten().tolist())
        return "".join((self.begin or "", *words, self.end or ""))

    def from_text(self, text: str, length: int) -> Iterator[Tensor]:
        """The codes (length,), of a residual stream (length, levels), of each image in a text, in their order.

        Blanks between words are ignored, as slow text tokenizers add them. Raises ZooError for an image without an
        end, one of another length, a word beyond the codebook (or of another level) and anything else between begin and
        end: nothing is repaired silently.
        """
        if not isinstance(text, str):
            raise ZooError(f"expected a text with images of '{self.name}', got {type(text).__name__}.")
        self.check_whole(length)
        place, count = 0, length * self.levels
        first, last = (self.word.format(number) for number in (0, self.size * self.levels - 1))
        pattern = r"(\d{1,18})".join(re.escape(part) for part in re.split(r"\{.*?\}", self.word))
        while (start := text.find(self.begin, place)) >= 0:
            place = text.find(self.end, start)
            if place < 0:
                raise ZooError(f"expected {self.end} behind {self.begin}, the text has none: {text[start:][:80]!r}.")
            body = re.sub(r"\s+", "", text[start + len(self.begin) : place])
            numbers = [int(number) for number in re.findall(pattern, body)]
            if body != "".join(map(self.word.format, numbers)):
                rest = re.sub(pattern, "", body) or body
                raise ZooError(f"expected only words {first} to {last} in an image, got also {rest[:40]!r}.")
            if len(numbers) != count:
                raise ZooError(f"expected an image of {count} words, got {len(numbers)}; cut off or malformed text.")
            codes = torch.tensor(numbers).view(length, self.levels) - self.size * torch.arange(self.levels)
            wrong = ((codes < 0) | (codes >= self.size)).flatten().nonzero()[:, 0].tolist()
            if wrong:
                level = f" at level {wrong[0] % self.levels}" if self.levels > 1 else ""
                raise ZooError(f"expected words {first} to {last}, got {self.word.format(numbers[wrong[0]])}{level}.")
            yield codes if self.levels > 1 else codes[:, 0]

    def check_whole(self, length: int) -> None:
        """Raise ZooError where images of so many positions cannot be told from what is around them."""
        if not (self.begin and self.end and "{" in self.word):
            raise ZooError(f"stream '{self.name}' lacks words around an image, or numbers in them; none can be found.")
        if type(length) is not int or length < 1:
            raise ZooError(f"an image has at least 1 token, got length {shortened(length)}.")


class Vocabulary:
    """Text words 0..text_size-1, then the words of each stream in order.

    Raises ZooError when two words are the same.
    """

    def __init__(self, text_size: int, streams: Sequence[Stream]):
        self.text_size, self.streams = text_size, {stream.name: stream for stream in streams}
        self.words = [word for stream in streams for word in stream.words()]
        """Every added word, in the order of the ids from text_size on."""
        self._ids = {word: text_size + i for i, word in enumerate(self.words)}
        if len(self._ids) < len(self.words) or len(self.streams) < len(streams):
            seen = Counter(self.words) if len(self._ids) < len(self.words) else Counter(s.name for s in streams)
            twice = sorted(word for word, times in seen.items() if times > 1)
            raise ZooError(f"words and streams of a vocabulary must differ; these come twice: {', '.join(twice[:10])}.")

    def __len__(self) -> int:
        return self.text_size + len(self.words)

    def id_of(self, word: str) -> int:
        """The id of an added word."""
        if not isinstance(word, str) or word not in self._ids:
            word = shortened(word).strip("'")
            close = nearest(word, self.words) if len(self.words) < 1000 else f"; words are such as {self.words[-1]}."
            raise ZooError(f"'{word}' is no added word of this vocabulary{close}")
        return self._ids[word]

    def word_of(self, index: int) -> str:
        """The added word of an id."""
        if type(index) is not int or not self.text_size <= index < len(self):
            raise ZooError(f"id {shortened(index)} is no added word; those are {self.text_size}..{len(self) - 1}.")
        return self.words[index - self.text_size]

    def code_ids(self, stream: str) -> range:
        """The ids of a stream's codes, all levels."""
        chosen = self._stream(stream)
        start = self._ids[chosen.word.format(0)]
        return range(start, start + chosen.size * chosen.levels)

    def to_ids(self, stream: str, codes: Tensor) -> Tensor:
        """Codes to ids of the same shape, int64: (...), or (..., levels) for a residual stream."""
        chosen, start = self._stream(stream), self.code_ids(stream).start
        codes = integers(codes, 0, chosen.size, f"codes of stream '{stream}'", chosen.levels) + start
        return codes if chosen.levels == 1 else codes + chosen.size * torch.arange(chosen.levels, device=codes.device)

    def to_codes(self, stream: str, ids: Tensor) -> Tensor:
        """The inverse of to_ids. Raises ZooError when an id is not of this stream, or of another level."""
        chosen, found = self._stream(stream), self.code_ids(stream)
        codes = integers(ids, found.start, found.stop, f"ids of stream '{stream}'", chosen.levels) - found.start
        if chosen.levels > 1:
            codes = codes - chosen.size * torch.arange(chosen.levels, device=codes.device)
            integers(codes, 0, chosen.size, f"codes of '{stream}', each id in the range of its level,")
        return codes

    def stream_of(self, ids: Tensor) -> Tensor:
        """Index of the stream (in order) whose code each id is; -1 for text and for begin and end words."""
        streams = torch.full_like(ids, -1)
        for index, name in enumerate(self.streams):
            found = self.code_ids(name)
            streams[(ids >= found.start) & (ids < found.stop)] = index
        return streams

    def join(self, pieces: Sequence[Tensor | Sequence[int] | Tokens]) -> Tensor:
        """Text (ids) and images (Tokens of one image each) to one sequence of ids (T,), int64.

        An image is, for each stream of the vocabulary that it has: begin word, the codes of its live tokens position
        by position (and level by level within one), end word.
        """
        parts = []
        for piece in pieces:
            if not isinstance(piece, Tokens):
                parts.append(sequence(piece, self.text_size, "ids of text"))
                continue
            if len(piece) != 1 or not piece.ids.keys() & self.streams.keys():
                raise ZooError(
                    f"an image in a sequence is Tokens of one image with a stream of {sorted(self.streams)}, "
                    f"got {len(piece)} images with {sorted(piece.ids)}."
                )
            for name, stream in self.streams.items():
                if name in piece.ids:
                    live = self.to_ids(name, piece.ids[name].cpu()[0][piece.mask.cpu()[0]]).flatten()
                    marks = [[self._ids[mark]] if mark else [] for mark in (stream.begin, stream.end)]
                    parts += [
                        torch.tensor(marks[0], dtype=torch.int64),
                        live,
                        torch.tensor(marks[1], dtype=torch.int64),
                    ]
        return torch.cat(parts) if parts else torch.tensor([], dtype=torch.int64)

    def split(self, ids: Tensor | Sequence[int]) -> list[tuple[str, Tensor]]:
        """A sequence (T,) to its pieces in order: ("text", ids (n,)) or (stream, codes (n,) or (n, levels)).

        Begin and end words are dropped. Raises ZooError for an id beyond the vocabulary or a cut-off position.
        """
        ids = sequence(ids, len(self), "ids of this vocabulary")
        owners = self.stream_of(ids)
        owners[(owners < 0) & (ids >= self.text_size)] = -2  # begin and end words
        changes = (owners.diff() != 0).nonzero().flatten() + 1
        names, pieces = list(self.streams), []
        for part, owner in zip(ids.tensor_split(changes), owners.tensor_split(changes), strict=True):
            if not len(part) or owner[0] == -2:
                continue
            if owner[0] == -1:
                pieces.append(("text", part))
                continue
            name = names[owner[0]]
            levels = self.streams[name].levels
            if len(part) % levels:
                raise ZooError(f"{len(part)} ids of '{name}' are no whole number of positions of {levels} levels.")
            pieces.append((name, self.to_codes(name, part.unflatten(0, (-1, levels)) if levels > 1 else part)))
        return pieces

    def images_in(self, ids: Tensor | Sequence[int], stream: str, length: int) -> list[Tensor]:
        """The codes (length,) or (length, levels) of each image of a stream in a sequence (T,) that a model wrote.

        Unlike `split` this takes whole images alone: ZooError for one without an end, of another length, or with other
        ids between begin and end.
        """
        chosen, ids = self._stream(stream), sequence(ids, 2**63 - 1, "ids").tolist()
        chosen.check_whole(length)
        begin, end, count = self.id_of(chosen.begin), self.id_of(chosen.end), length * chosen.levels
        found, place = [], 0
        while begin in ids[place:]:
            start = ids.index(begin, place) + 1
            if end not in ids[start:]:
                raise ZooError(f"expected {chosen.end} ({end}) behind {chosen.begin}, the ids have none; cut off?")
            place = ids.index(end, start)
            if place - start != count:
                raise ZooError(f"expected an image of {count} words, got {place - start}; cut off or malformed.")
            image = torch.tensor(ids[start:place])
            found.append(self.to_codes(stream, image.unflatten(0, (-1, chosen.levels)) if chosen.levels > 1 else image))
        return found

    def extend_tokenizer(self, tokenizer) -> None:
        """Add all words to a transformers tokenizer, as ordinary added tokens that decoding keeps.

        Raises ZooError when it has another number of words than text_size, or would give a word another id.
        """
        if len(tokenizer) != self.text_size:
            raise ZooError(f"the vocabulary is for a text tokenizer of {self.text_size} words, got {len(tokenizer)}.")
        tokenizer.add_tokens(self.words)
        wrong = [word for word in self.words if tokenizer.convert_tokens_to_ids(word) != self._ids[word]]
        if wrong:
            raise ZooError(f"the text tokenizer already had some of the words: {', '.join(wrong[:10])}.")

    def extend_embedding(self, model: nn.Module, std: float = 0.02) -> None:
        """Resize a transformers LM's embeddings; new rows are normal(0, std), as LLaMA's are.

        Raises ZooError when the model has fewer rows than text words, or more than the whole vocabulary.
        """
        rows = model.get_input_embeddings().weight.shape[0]
        if not self.text_size <= rows <= len(self):
            raise ZooError(f"a model of {self.text_size} to {len(self)} words can be extended, got one of {rows}.")
        model.resize_token_embeddings(len(self), mean_resizing=False)
        for layer in {model.get_input_embeddings(), model.get_output_embeddings()} - {None}:
            with torch.no_grad():
                layer.weight[self.text_size :].normal_(0, std)

    def _stream(self, name: str) -> Stream:
        if not isinstance(name, str) or name not in self.streams:
            name = shortened(name).strip("'")
            raise ZooError(f"the vocabulary has no stream '{name}'{nearest(name, self.streams)}")
        return self.streams[name]


def integers(values: Tensor | Sequence, low: int, high: int, what: str, levels: int = 1) -> Tensor:
    """The values as int64, (...), or (..., levels).

    Raises ZooError, a sentence that begins with `what`, where they are no integers from low to high - 1.
    """
    if not isinstance(values, Tensor):
        try:
            values = torch.as_tensor(values)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ZooError(f"{what} must be integers, got {shortened(values)} ({one_line(error)}).") from error
        values = values if values.numel() else values.long()
    if not is_plain(values):
        raise ZooError(f"{what} must be a dense tensor, got one of {values.layout} on {values.device}.")
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ZooError(f"{what} must be integers, got {values.dtype}.")
    if values.numel() >= 2**31:
        raise ZooError(f"{what} are fewer than 2^31 at once, got shape {tuple(values.shape)}.")
    if levels > 1 and (not values.ndim or values.shape[-1] != levels):
        raise ZooError(f"{what} have {levels} levels last, got shape {tuple(values.shape)}.")
    if values.numel() and not (low <= values.min() and values.max() < high):
        raise ZooError(f"{what} must be in {low}..{high - 1}, got {values.min()} to {values.max()}.")
    return values.long()


def sequence(values: Tensor | Sequence[int], high: int, what: str) -> Tensor:
    """The values (T,) as int64. Raises ZooError as `integers` does, and for other shapes."""
    values = integers(values, 0, high, what)
    if values.ndim != 1:
        raise ZooError(f"{what} are a sequence (T,), got shape {tuple(values.shape)}.")
    return values

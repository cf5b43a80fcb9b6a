"""Images as ids that the language model itself reads and says, word by word: any discrete tokenizer of the zoo."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from zoo import registry
from zoo.errors import ZooError, expect_integer, shortened
from zoo.files import write_json
from zoo.flow import guide, guide_twice
from zoo.lm.vision import TOKENIZER_FILE, GeneratedImages, Generators, Seen, Vision, drawn
from zoo.tokenizer import Tokenizer, TokenizerInfo, Tokens
from zoo.vocabulary import Stream

if TYPE_CHECKING:
    from zoo.lm.model import VisualLM


class CodeVision(Vision):
    """A frozen tokenizer of ids, each of which is a word of the language model.

    An image in a sequence is, for each stream, its begin word, its codes position by position (and level by level
    within one), and its end word.

    Args:
        tokenizer: a discrete one.
        streams: which of its streams, in the order of the sequence: names, whose words are then <NAME>, <NAME_0>,
            <NAME_1>, ..., </NAME>, or Streams with words of their own. Default: all.
        num_tokens: of a tokenizer of variable length: exactly so many of each image, as its encode(num_tokens=) gives
            them. Without it those that are live are read, and no images are written, since where dropped ones were
            cannot be told from the others.
        by_direction: an image that is written has only those streams that decode reads, and one that is read only the
            others, if there are any.

    Raises:
        ZooError: a tokenizer of latents, a stream that it does not have, or words that do not fit one.
    """

    kind, FILE, spoken = "code", "codes.json", True
    top_p = 0.5  # of the scripts of SEED-LLaMA, which draw at temperature 1

    def __init__(
        self,
        tokenizer: Tokenizer,
        streams: Sequence[Stream | str] | None = None,
        num_tokens: int | None = None,
        by_direction: bool = False,
    ):
        super().__init__(tokenizer)
        info = tokenizer.info
        if info.kind != "discrete":
            raise ZooError(f"{info.name} has latents and no ids that could be words; give a tokenizer of ids.")
        self.settings = encode_settings(info, num_tokens)
        streams = info.streams if streams is None else [streams] if isinstance(streams, str) else streams
        self.streams = tuple(_checked(info, one) for one in streams)
        self.num_tokens, self.length = num_tokens, num_tokens or info.max_tokens
        self.by_direction = by_direction
        missing = set(info.decoded or info.streams) - {stream.name for stream in self.streams}
        if missing:
            self.obstacle = f"pixels are decoded from the stream '{min(missing)}', which is not among those in use"
        elif info.variable_length and num_tokens is None:
            self.obstacle = "tokens of variable length are read and not written yet; set num_tokens"

    def standing(self, written: bool) -> tuple[Stream, ...]:
        decoded = self.tokenizer.info.decoded or self.tokenizer.info.streams
        chosen = tuple(stream for stream in self.streams if (stream.name in decoded) == written)
        return (chosen if self.by_direction else ()) or self.streams

    def read(self, tokens: Tokens) -> Seen:
        # ids are laid out in sequences on the CPU: unlike latents, they wait for the device
        return Seen(Tokens({stream.name: tokens.ids[stream.name] for stream in self.streams}, mask=tokens.mask).cpu())

    def reconstruct(self, images: Tensor) -> Tensor:
        return self.tokenizer.decode(self.see(self.tokenizer.check_images(images)).tokens)

    def writer(self, model: VisualLM, count: int, copies: int, generator: Generators, **settings) -> CodeWriter:
        return CodeWriter(self, model, count, copies, generator, **settings)

    def save(self, folder: Path, about: dict) -> None:
        streams = [asdict(stream) for stream in self.streams]
        settings = {"num_tokens": self.num_tokens, "by_direction": self.by_direction}
        about = {"tokenizer": self.tokenizer.info.name, "streams": streams} | settings | about
        write_json(folder / self.FILE, about)
        super().save(folder, about)

    @classmethod
    def load(cls, folder: Path) -> tuple[CodeVision, dict]:
        try:
            about = json.loads((folder / cls.FILE).read_text())
            streams = [Stream(**stream) for stream in about["streams"]]
            name, num_tokens, _ = about["tokenizer"], about["num_tokens"], about["bos"]
        except (ValueError, KeyError, TypeError) as error:
            raise ZooError(f"{folder / cls.FILE} is not what VisualLM.save wrote ({error}); copy it again.") from error
        tokenizer = registry.load_tokenizer(name, folder / TOKENIZER_FILE)
        return cls(tokenizer, streams, num_tokens, about.get("by_direction", False)), about


class CodeWriter:
    """One word after the other, of those that can stand at its place: the codes of its stream and level, or a mark.

    What is drawn are numbers; `places`, `scores`, `read` and `tokens` say what they mean.
    """

    def __init__(
        self,
        vision: CodeVision,
        model: VisualLM,
        count: int,
        copies: int,
        generator: Generators,
        text_scale: float,
        image_scale: float,
        temperature: float,
        num_steps: int | None,
        do_sample: bool,
        top_p: float | None,
        top_k: int | None,
    ):
        self.top_p, self.top_k = vision.top_p if top_p is None else top_p, top_k
        if num_steps is not None:
            raise ZooError(f"num_steps is for a flow head, and {vision.tokenizer.info.name} has ids; leave it out.")
        if not temperature > 0:  # a finite number, see generate_image
            raise ZooError(f"temperature must be above 0 for ids, got {temperature}; do_sample=False is greedy.")
        if type(self.top_p) not in (int, float) or not 0 < self.top_p <= 1:
            raise ZooError(f"top_p must be above 0 and at most 1, got {shortened(top_p)}.")
        if top_k is not None:
            expect_integer("top_k", top_k, 1)
        self.vision, self.model, self.copies, self.temperature = vision, model, copies, temperature
        self.scales = text_scale, image_scale
        self.possible, self.words = self.places(), []
        self.length = len(self.possible)
        shape = (count, self.length)
        self.draws = drawn(torch.rand, shape, generator, model.lm.device).double() if do_sample else None

    def write(self, output: CausalLMOutputWithPast) -> Tensor:
        number = len(self.words)
        place = self.possible[number]
        scores = self._guided(self.scores(output, place).float())
        draws = None if self.draws is None else self.draws[:, number]
        self.words.append(place.start + pick(scores, draws, self.temperature, self.top_p, self.top_k))
        return self.read(self.words[-1]).repeat(self.copies, 1)[:, None]

    def finish(self) -> GeneratedImages:
        tokens = self.tokens(torch.stack(self.words, dim=1))
        return GeneratedImages(self.vision.tokenizer.decode(tokens), tokens)

    def places(self) -> list[range]:
        """The numbers that are possible at each place."""
        return [numbers for _, numbers in _places(self.vision, self.model)[1:]]  # the first word ends the prompt

    def scores(self, output: CausalLMOutputWithPast, place: range) -> Tensor:
        """Of these numbers, (copies * B, len(place)), by what the model says at the last position."""
        return output.logits[:, -1, place.start : place.stop]

    def read(self, written: Tensor) -> Tensor:
        """What the model reads next, (B, hidden_size), for numbers (B,)."""
        return self.model.lm.get_input_embeddings()(written)

    def tokens(self, written: Tensor) -> Tokens:
        """Of all numbers (B, length)."""
        info, ids, names = self.vision.tokenizer.info, {}, [name for name, _ in _places(self.vision, self.model)[1:]]
        for stream in self.vision.standing(written=True):
            codes = written[:, [name == stream.name for name in names]]
            if stream.name in info.levels:
                codes = codes.unflatten(1, (-1, stream.levels))
            ids[stream.name] = self.model.vocabulary.to_codes(stream.name, codes)
        return Tokens(ids)

    def _guided(self, scores: Tensor) -> Tensor:
        """Scores (copies * B, K) of all rows to those (B, K) of the images."""
        rows, (text_scale, image_scale) = scores.chunk(self.copies), self.scales
        if self.copies == 1:
            return rows[0]
        if self.copies == 2:
            return guide(*rows, text_scale)
        return guide_twice(rows[0], rows[2], rows[1], text_scale, image_scale)


def pick(
    scores: Tensor,
    draws: Tensor | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
) -> Tensor:
    """One of K for each row of scores (B, K), (B,) int64.

    draws: (B,) uniform in 0..1; None: the highest score, the first of equal ones. Of the top_k most likely ones, and of
    these the smallest set that has a probability of top_p or more, in which probabilities keep their proportions.
    """
    if draws is None:
        return scores.argmax(1)
    scores, order = (scores.double() / temperature).sort(dim=1, descending=True, stable=True)
    likely = scores[:, :top_k].softmax(1)
    total = likely.cumsum(1)
    kept = total - likely < top_p
    kept[:, 0] = True
    mass = (likely * kept).sum(1)
    passed = (total <= (draws * mass)[:, None]).sum(1)
    return order.gather(1, passed.clamp(max=kept.sum(1) - 1)[:, None])[:, 0]


def encode_settings(info: TokenizerInfo, num_tokens: int | None) -> dict:
    """Settings of a tokenizer's encode for exactly so many tokens; None: it decides. Raises ZooError."""
    if num_tokens is None:
        return {}
    if not info.variable_length:
        raise ZooError(
            f"num_tokens is for tokenizers of variable length, and {info.name} has {info.max_tokens} tokens for "
            "every image; leave it out."
        )
    expect_integer("num_tokens", num_tokens, 1)
    return {"num_tokens": num_tokens}


def _checked(info: TokenizerInfo, stream: Stream | str) -> Stream:
    """A stream with its words. Raises ZooError where the tokenizer has none like it."""
    plain = Stream.of(info, stream if isinstance(stream, str) else stream.name)
    if isinstance(stream, str):
        return plain
    if (stream.size, stream.levels) != (plain.size, plain.levels):
        raise ZooError(
            f"stream '{plain.name}' of {info.name} has {plain.size} codes and {plain.levels} levels, got words for "
            f"{stream.size} codes and {stream.levels} levels."
        )
    if not (stream.begin and stream.end):
        raise ZooError(f"stream '{plain.name}' needs begin= and end=, the words around an image.")
    return stream


def _places(vision: CodeVision, model: VisualLM) -> list[tuple[str, range]]:
    """The places of an image in their order: the stream ("" for the words around it), and which ids are possible."""
    places = []
    for stream in vision.standing(written=True):
        begin, end = (model.vocabulary.id_of(word) for word in (stream.begin, stream.end))
        codes = model.vocabulary.code_ids(stream.name)
        position = [(stream.name, codes[level * stream.size :][: stream.size]) for level in range(stream.levels)]
        places += [("", range(begin, begin + 1)), *position * vision.length, ("", range(end, end + 1))]
    return places[:-1]  # with the last code the image is complete

"""Perception tokens as words of a language model: AURORA sections 3.2 and 3.4, and its constrained decoding."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ZooError
from zoo.nn.precision import wide
from zoo.tokenizers.aurora.tokenizer import AuroraTokenizer
from zoo.vocabulary import Stream, Vocabulary, integers

DEPTH_START, DEPTH_END, DEPTH_WORD = "<DEPTH_START>", "<DEPTH_END>", "<DEPTH_{}>"
PIXEL_WORD = "<PIXEL_{}>"
PHOTO_SIDE = 336
"""Photos are squashed to this many pixels a side before boxes and markers are written down."""


def depth_stream(num_codes: int = 128) -> Stream:
    """The words of a depth map."""
    return Stream("depth", num_codes, DEPTH_WORD, begin=DEPTH_START, end=DEPTH_END)


def aurora_vocabulary(
    text_size: int = 32000, depth: bool = True, pixels: bool = False, num_codes: int = 128
) -> Vocabulary:
    """The words that AURORA adds to LLaMA's 32,000: for depth first, then for pixel coordinates.

    The authors train a model for each, with its own words only.
    """
    streams = []
    if depth:
        streams.append(depth_stream(num_codes))
    if pixels:
        streams.append(Stream("pixel", PHOTO_SIDE, PIXEL_WORD))
    return Vocabulary(text_size, streams)


def depth_to_text(ids: Tensor | Sequence[int]) -> str:
    """The ids of one map, in raster order or as a grid, to "<DEPTH_START><DEPTH_17>...<DEPTH_END>"."""
    return depth_stream().to_text(ids)


def text_to_depth(text: str, length: int = 100, num_codes: int = 128) -> Tensor:
    """The first map in a text, (length,) int64. Blanks between words are ignored, as slow text tokenizers add them.

    Raises ZooError for a text without a map, a map of another length, an id beyond the codebook and anything else
    between start and end: nothing is repaired silently.
    """
    for ids in depth_stream(num_codes).from_text(text, length):
        return ids
    raise ZooError(f"expected a map between {DEPTH_START} and {DEPTH_END}, the text has none: {text[:80]!r}.")


def quantize_boxes(boxes: Tensor, width: float, height: float) -> Tensor:
    """Boxes (M, 4) x1, y1, x2, y2 in pixels of a width x height photo to int64 words 0..335: floor, then clamp.

    The authors' rounding is not published; floor is the zoo's choice.
    """
    scale = boxes.new_tensor([PHOTO_SIDE / width, PHOTO_SIDE / height] * 2, dtype=torch.float64)
    return (boxes * scale).floor().long().clamp(0, PHOTO_SIDE - 1)


def dequantize_boxes(words: Tensor, width: float, height: float) -> Tensor:
    """The inverse of quantize_boxes up to its rounding: words (M, 4) to float pixels of the photo."""
    return words * torch.tensor([width / PHOTO_SIDE, height / PHOTO_SIDE] * 2)


def boxes_to_text(boxes: Tensor | Sequence[Sequence[int]]) -> str:
    """Boxes (M, 4) of words 0..335 to one line each, numbered from 1. Raises ZooError for other values."""
    boxes = integers(boxes, 0, PHOTO_SIDE, "boxes (M, 4), see quantize_boxes,")
    if boxes.numel() and boxes.shape[-1:] != (4,):
        raise ZooError(f"expected boxes (M, 4), got shape {tuple(boxes.shape)}.")
    lines = (",".join(PIXEL_WORD.format(v) for v in box) for box in boxes.view(-1, 4).tolist())
    return "".join(f"Bounding box {k}: ({line})\n" for k, line in enumerate(lines, 1))


def text_to_boxes(text: str) -> Tensor:
    """All boxes written in a text, (M, 4) int64 in 0..335, whatever blanks stand between the words.

    Raises ZooError for a box that has not four words, or a word beyond 335.
    """
    boxes = []
    for number, body in re.findall(r"Bounding\s+box\s+(\d+)\s*:\s*\(([^)]*)\)?", text):
        words = [int(v) for v in re.findall(r"<PIXEL_(\d{1,18})>", body)]
        if len(words) != 4 or max(words) >= PHOTO_SIDE:
            raise ZooError(f"expected box {number} as four words <PIXEL_0> to <PIXEL_335>, got {body.strip()!r}.")
        boxes.append(words)
    return torch.tensor(boxes, dtype=torch.int64).view(-1, 4)


class DepthConstraint:
    """Constrained decoding of one map per answer, as a logits processor of transformers' `generate`.

    Until a map is begun, the codes and the end word cannot be written; after the start word exactly `length` codes
    follow, then the end word; after that no word of depth is written again. With greedy decoding this gives what the
    authors' replacement of transformers' generation module gives; sampling and beams work as well.

    Args:
        vocabulary: one with the stream "depth".
        prompt_length: words of the (left-padded) prompt, in which maps are not counted.
        length: codes of a map.
    """

    def __init__(self, vocabulary: Vocabulary, prompt_length: int, length: int = 100):
        self.codes = vocabulary.code_ids("depth")
        self.start, self.end = vocabulary.id_of(DEPTH_START), vocabulary.id_of(DEPTH_END)
        self.prompt_length, self.length = prompt_length, length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids (B, T), scores (B, V) -> scores with the forbidden words at -inf."""
        if scores.shape[1] <= max(self.end, self.start, self.codes[-1]):
            raise ZooError(
                f"the model has {scores.shape[1]} words and the depth words end at {max(self.end, self.codes[-1])}; "
                "extend its embedding first (Vocabulary.extend_embedding)."
            )
        written = input_ids[:, self.prompt_length :]
        starts = written == self.start
        begun = starts.any(1)
        # words after the start word; argmax finds the first
        after = written.shape[1] - 1 - starts.int().argmax(1) if written.shape[1] else begun.long()
        inside = begun & (after < self.length)
        closing = begun & (after == self.length)
        done = begun & (after > self.length)

        is_code = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
        is_code[self.codes.start : self.codes.stop] = True
        is_end = torch.zeros_like(is_code)
        is_end[self.end] = True
        is_depth = is_code | is_end
        is_depth[self.start] = True

        forbidden = torch.where(
            inside[:, None],
            ~is_code,
            torch.where(closing[:, None], ~is_end, torch.where(done[:, None], is_depth, is_code | is_end)),
        )
        return scores.masked_fill(forbidden, float("-inf"))


def answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Next-word cross entropy over the answer: perception tokens count like any other word (AURORA, section 3.4).

    logits (B, T, V); labels (B, T) int64, the words themselves, -100 where the prompt stands. The paper's
    distillation loss is this one, since its specialist's tokens are hard ids.
    """
    return F.cross_entropy(wide(logits[:, :-1].flatten(0, 1)), labels[:, 1:].flatten(), ignore_index=-100)


def map_loss(tokenizer: AuroraTokenizer, logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean squared error between the map of soft words and that of the true ids (AURORA's optional auxiliary loss).

    logits (B, K, h, w) of the model over the code words, ids (B, h, w) int64. It did not help the authors and is not
    in their released training; the tokenizer stays as it is.
    """
    with torch.no_grad():
        target = tokenizer.decode_ids(ids)
    return F.mse_loss(tokenizer.decode_soft(logits, temperature), target)

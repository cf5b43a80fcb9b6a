"""Ids, latents, masks and words that no encoder made."""

import math

import pytest
import torch
from fuzz_helpers import anything, attempt, fuzz, loaded, refused, shipped
from hypothesis import example
from hypothesis import strategies as st
from test_fuzz_images import noise

from zoo import Tokens
from zoo.tokenizers.aurora import language as aurora
from zoo.tokenizers.seed import language as seed
from zoo.vocabulary import Stream, Vocabulary

TOKENIZERS = [name for _, name in shipped("tokenizer")]
READS = "decode", "embed", "features_of", "embedding_of", "code_embeddings", "decode_embedding", "decode_features"
CASES = (
    *("no tokens", "stream", "extra stream", "other kind", "dtype", "shape"),
    *("enormous", "value", "mask", "empty", "grid"),
)
EXTREMES = [-1, -(2**63), 2**63 - 1, 2**31, 2**32]


def right_tokens(tokenizer, count=1):
    info = tokenizer.info
    return tokenizer.encode(noise((count, info.channels, info.image_size, info.image_size)))


def parts(tokens):
    """Arguments that make these tokens again."""
    return {"ids": dict(tokens.ids), "latents": dict(tokens.latents), "mask": tokens.mask.clone(), "grid": tokens.grid}


@st.composite
def wrong_tokens(draw, tokenizer):
    """A function that makes, from those of an image, tokens that are not this tokenizer's, and the name of the case."""
    info = tokenizer.info
    kind = "ids" if info.kind == "discrete" else "latents"
    stream = (info.decoded or info.streams)[0]
    made = parts(right_tokens(tokenizer))
    values = made[kind][stream].clone(memory_format=torch.contiguous_format)
    cases = [
        "no tokens",
        "stream",
        "extra stream",
        "other kind",
        "dtype",
        "shape",
        "enormous",
        "value",
        "mask",
        "empty",
    ]
    case = draw(st.sampled_from(cases + ["grid"]))
    if case == "no tokens":
        return case, draw(st.sampled_from([values, made, None, [values], "tokens", 3, ()]))
    if case == "stream":
        made[kind] = {"no such stream": values}
    elif case == "extra stream":
        made[kind]["no such stream"] = values
    elif case == "other kind":
        made["latents" if kind == "ids" else "ids"]["image"] = noise((*values.shape[:2], 4)).to(
            torch.float32 if kind == "ids" else torch.int64
        )
    elif case == "dtype":
        dtypes = [torch.float32, torch.int32, torch.bool, torch.complex64]
        made[kind][stream] = values.to(
            draw(st.sampled_from(dtypes if kind == "ids" else [torch.int64, torch.complex64]))
        )
    elif case == "shape":
        made["mask"] = made["grid"] = None
        shape = draw(st.lists(st.integers(1, 3), max_size=5))
        right = len(shape) == values.ndim and shape[2:] == list(values.shape[2:])
        made[kind][stream] = values.new_zeros([*shape, 1, 1] if right else shape)
        if values.ndim == 3 and kind == "ids" and len(shape) == 3:
            made[kind][stream] = values.new_zeros(*shape[:2], 1 + values.shape[2])
    elif case == "enormous":
        made["mask"] = made["grid"] = None
        size = draw(st.sampled_from([2**18, 2**31, 2**40]))
        made = {kind: {stream: values[:1, :1].expand(1, size, *values.shape[2:])}}
    elif case == "value":
        bad = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
        if kind == "ids":
            size = info.codebook_sizes[stream]
            bad = draw(st.sampled_from([*EXTREMES, size]) | st.integers(size, 2**63 - 1) | st.integers(-(2**63), -1))
        values.view(-1)[draw(st.integers(0, values.numel() - 1))] = bad
        made[kind][stream] = values
    elif case == "mask":
        mask = made["mask"]
        wrong = [
            mask.float(),
            mask[:, 1:],
            mask[0],
            mask[..., None],
            mask.repeat(2, 1),
            "mask",
            [True],
            mask.to_sparse(),
        ]
        if not info.variable_length:
            wrong.append(mask.new_zeros(mask.shape))
        made["mask"] = draw(st.sampled_from(wrong))
    elif case == "empty":
        count = draw(st.sampled_from([(0, values.shape[1]), (1, 0), (0, 0)]))
        made = {kind: {stream: values.new_zeros((*count, *values.shape[2:]))}}
    elif case == "grid":
        count = values.shape[1]
        made["grid"] = draw(
            st.sampled_from(
                [(count, 2), (-1, -count), (0, 0), (1,), (1, 1, count), "ab", (1.0, float(count)), 64, ("1", "64")]
            )
        )
    return case, made


@pytest.mark.parametrize("name", TOKENIZERS)
@fuzz(data=st.data())
def test_wrong_tokens_are_refused(name, data):
    tokenizer = loaded("tokenizer", name)
    case, made = data.draw(wrong_tokens(tokenizer))
    if case == "no tokens":
        refused(tokenizer.decode, made, says=[name, type(made).__name__])
    else:
        refused(lambda: tokenizer.decode(Tokens(**made)))


@pytest.mark.parametrize("name", TOKENIZERS)
@fuzz(data=st.data())
def test_every_reader_of_tokens_takes_or_refuses_them(name, data):
    tokenizer = loaded("tokenizer", name)
    read = data.draw(st.sampled_from([one for one in READS if hasattr(tokenizer, one)]))
    tokens = right_tokens(tokenizer, 2)
    if not data.draw(st.booleans()):
        tokens = data.draw(anything | st.just(tokens.mask) | st.just(noise((1, 4, 3))))
    elif data.draw(st.booleans()):
        made = parts(tokens)
        streams = made["ids"] or made["latents"]
        made["mask"] = torch.rand(tokens.mask.shape) < data.draw(st.sampled_from([0.0, 0.5, 1.0]))
        stream = data.draw(st.sampled_from(sorted(streams)))
        limit = tokenizer.info.codebook_sizes.get(stream, 2)
        streams[stream] = torch.randint_like(streams[stream], 0, limit)[:, : data.draw(st.sampled_from([1, 60, 64]))]
        tokens = attempt(Tokens, **made)
    result = attempt(getattr(tokenizer, read), tokens)
    for found in result.values() if isinstance(result, dict) else [] if result is None else [result]:
        assert found.isfinite().all()


@fuzz(made=st.dictionaries(st.sampled_from(["ids", "latents", "mask", "grid"]), anything))
@example(made={"ids": {"image": [1, 2, 3]}})
@example(made={"ids": [1, 2], "mask": True})
def test_tokens_are_made_of_tensors_alone(made):
    refused(Tokens, **made)


SMALL = Vocabulary(
    10,
    [
        Stream("image", 16, "<img_{:05d}>", begin="<img>", end="</img>", marks_first=False),
        Stream("deep", 4, "<deep_{}>", 3, "<deep>", "</deep>"),
        Stream("bare", 5, "<bare_{}>"),
    ],
)
NAMES = st.sampled_from(["image", "deep", "bare", "text", ""]) | anything
NUMBERS = st.integers(-2, len(SMALL) + 2) | st.sampled_from(EXTREMES)
SEQUENCES = (
    anything
    | st.lists(NUMBERS, max_size=12)
    | st.lists(st.lists(NUMBERS, max_size=3), max_size=3)
    | st.sampled_from(
        [
            torch.zeros(3),
            torch.tensor([True]),
            torch.tensor(3),
            torch.tensor([200], dtype=torch.uint8),
            torch.zeros(2, 3, dtype=torch.int64),
            torch.zeros(3, dtype=torch.complex64),
            torch.zeros(1, dtype=torch.int64).expand(2**40),
            torch.eye(3).long().to_sparse(),
        ]
    )
)


@fuzz(stream=NAMES, ids=SEQUENCES, length=anything | st.integers(0, 4))
@example(stream="image", ids=[1.5, 2.0], length=2)
@example(stream="bare", ids=[1, 2], length=2)
@example(stream="deep", ids=torch.tensor([40, 41]), length=1)
def test_a_vocabulary_takes_ids_or_refuses_them(stream, ids, length):
    for call in (SMALL.to_ids, SMALL.to_codes):
        there = attempt(call, stream, ids)
        if there is not None:
            back = SMALL.to_codes if call == SMALL.to_ids else SMALL.to_ids
            assert back(stream, there).tolist() == torch.as_tensor(ids).tolist()
    pieces = attempt(SMALL.split, ids)
    if pieces is not None:
        assert sum(len(piece.flatten()) for _, piece in pieces) <= len(ids)
    attempt(SMALL.images_in, ids, stream, length)
    joined = attempt(SMALL.join, [ids])
    assert joined is None or joined.tolist() == list(ids)
    attempt(SMALL.id_of, stream)
    attempt(SMALL.word_of, length)
    attempt(seed.ids_to_text, ids)
    attempt(aurora.depth_to_text, ids)
    attempt(aurora.boxes_to_text, ids)


WORDS = [
    *SMALL.words,
    "<img_16>",
    "<img_000001>",
    "<img_99999>",
    "<img_" + "9" * 30 + ">",
    "<img_٣>",
    "<img_-1>",
    " ",
    "a",
]
MARKED = st.lists(st.sampled_from(WORDS) | st.text(max_size=3), max_size=12).map("".join)


@fuzz(text=anything | MARKED | MARKED.map("<img>{}</img>".format), length=st.integers(0, 3) | anything)
@example(text="<img><img_" + "9" * 5000 + "></img>", length=1)
def test_a_text_is_read_whole_or_refused(text, length):
    for stream in SMALL.streams.values():
        images = attempt(lambda s=stream: list(s.from_text(text, length)))
        for codes in images or ():
            assert codes.shape == ((length, stream.levels) if stream.levels > 1 else (length,))
            assert stream.to_text(codes) in "".join(text.split())
    attempt(seed.text_to_ids, text, length)
    attempt(aurora.text_to_depth, text, length)


@fuzz(
    classes=anything | st.lists(NUMBERS, max_size=3).map(torch.tensor),
    settings=st.dictionaries(st.sampled_from(["num_steps", "guidance", "sampler", "generator"]), anything, max_size=2),
)
def test_a_generator_takes_classes_or_refuses_them(classes, settings):
    generator = loaded("generator", "xar-tiny")
    made = attempt(generator.generate, classes, **{"num_steps": 2} | settings)
    assert made is None or len(made) == len(classes)

"""Images as words of a visual language model: what is read, learned and written of them."""

import math

import pytest
import torch
import torch.nn.functional as F
from lm_helpers import (
    CAPTIONS,
    CODE_SIZES,
    LANGUAGE_MODELS,
    code_tokenizer,
    generators,
    make,
    make_codes,
    pictures,
    text_words,
)
from transformers import Qwen2Config
from transformers.generation import TopPLogitsWarper

import zoo
from zoo import Tokens, ZooError
from zoo.data import Loader, scenes
from zoo.lm import CodeVision, VisualLM, generate_image, generate_text
from zoo.lm.codes import pick
from zoo.tokenizers.mingtok.head import FlowHeadConfig
from zoo.vocabulary import Stream

TO_IMAGE = torch.tensor([True, False, False, True])
DROPPED = torch.tensor([False, True, False, True])
ALWAYS, NEVER = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)
KINDS = ("plain", "residual")
OWN_WORDS = [Stream("image", 12, "<img_{:05d}>", begin="<img>", end="</img>", marks_first=False)]


@torch.no_grad()
def losses(model, rows=slice(None), to_image=TO_IMAGE, dropped=DROPPED, texts=CAPTIONS, **settings):
    return model(texts[rows], pictures(4)[rows], to_image[rows], dropped[rows], **settings)


def spelled(model, image):
    """The words of one image (1, 3, H, W), with those around it, spelled out."""
    tokens, words = model.vision.tokenizer.encode(image), []
    for stream in model.vision.streams:
        codes = tokens.ids[stream.name][0].view(-1, stream.levels)
        numbers = [int(code) + stream.size * level for row in codes for level, code in enumerate(row)]
        words += [stream.begin, *map(stream.word.format, numbers), stream.end]
    return torch.tensor(model.words.convert_tokens_to_ids(words))


def is_code(model, ids):
    return model.vocabulary.stream_of(ids) >= 0


def logits_of(model, ids):
    """Of the words behind the first."""
    return model.lm(ids[None]).logits[0, :-1]


# Reading and learning


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lm", LANGUAGE_MODELS)
@torch.no_grad()
def test_codes_are_words_that_are_read_and_predicted(kind, lm):
    model = make_codes(kind, lm=lm)
    text, image = torch.tensor(model.text_ids("red")), spelled(model, pictures(4)[:1])
    ids = torch.cat([text, image])
    chosen = is_code(model, ids[1:])
    expected = F.cross_entropy(logits_of(model, ids)[chosen], ids[1:][chosen], reduction="none")
    words, codes = losses(model, slice(0, 1), texts=["red"])
    torch.testing.assert_close(codes, expected)
    assert words.shape == (0,)
    assert len(codes) == {"plain": 4, "residual": 4 * 2 + 4 * 3}[kind]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_caption_and_its_end_are_predicted_behind_the_words_of_its_image(kind):
    model = make_codes(kind, bos=True)
    text, image = model.text_ids(CAPTIONS[1]), spelled(model, pictures(4)[1:2])
    bos, end = (torch.tensor([one]) for one in (model.words.bos_token_id, model.words.eos_token_id))
    ids = torch.cat([bos, image, torch.tensor(text), end])
    first = len(image)
    words, codes = losses(model, slice(1, 2))
    expected = F.cross_entropy(logits_of(model, ids)[first:], ids[1 + first :], reduction="none")
    torch.testing.assert_close(words, expected)
    assert codes.shape == (0,)


@torch.no_grad()
def test_all_words_are_learned_where_that_is_asked_for():
    """<s> caption <img>...</img> </s> and <s> <img>...</img> caption </s>, and all behind <s> is learned."""
    model = make_codes(bos=True)
    words, codes = losses(model, slice(0, 2), dropped=NEVER, all_words=True)
    bos, end = (torch.tensor([one]) for one in (model.words.bos_token_id, model.words.eos_token_id))
    texts, images = [], []
    for i, order in enumerate(((0, 1), (1, 0))):
        pair = torch.tensor(model.text_ids(CAPTIONS[i])), spelled(model, pictures(4)[i : i + 1])
        ids = torch.cat([bos, *(pair[k] for k in order), end])
        errors = F.cross_entropy(logits_of(model, ids), ids[1:], reduction="none")
        texts.append(errors[ids[1:] < model.vocabulary.text_size])
        images.append(errors[ids[1:] >= model.vocabulary.text_size])
    torch.testing.assert_close(words, torch.cat(texts))
    torch.testing.assert_close(codes, torch.cat(images))


@pytest.mark.parametrize("all_words", [False, True])
def test_a_padded_batch_of_both_directions_equals_its_pairs_one_by_one(all_words):
    model = make_codes("residual")
    whole = losses(model, all_words=all_words)
    alone = [losses(model, slice(i, i + 1), all_words=all_words) for i in range(4)]
    for together, parts in zip(whole, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(together, torch.cat(parts), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_dropped_text_is_none():
    model = make_codes(bos=True)
    ids = torch.cat([torch.tensor([model.words.bos_token_id]), spelled(model, pictures(4)[3:])])
    chosen = is_code(model, ids[1:])
    expected = F.cross_entropy(logits_of(model, ids)[chosen], ids[1:][chosen], reduction="none")
    torch.testing.assert_close(losses(model, slice(3, 4))[1], expected)


def test_a_text_is_cut_off_where_the_context_ends():
    model = make_codes(bos=True)
    room = model.context - 1 - 6 - 1  # <s>, the image, </s>
    words, _ = losses(model, slice(1, 2), texts=["", "red " * 100])
    assert len(words) == room + 1


@pytest.mark.parametrize("to_image", [ALWAYS, NEVER])
def test_the_tokenizer_is_frozen_and_every_other_weight_learns_from_either_direction(to_image):
    model = make_codes("residual").train()
    assert not model.vision.tokenizer.training
    sum(loss.sum() for loss in model(CAPTIONS, pictures(4), to_image, DROPPED)).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("vision.tokenizer."), name


def test_ids_are_exact_under_autocast():
    model, images = make_codes(), torch.rand(64, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        seen = model.vision.see(images)
    assert torch.equal(seen.tokens.ids["image"], model.vision.tokenizer.encode(images).ids["image"])


def test_streams_stand_in_the_order_that_is_asked_for():
    model = make_codes("residual", streams=["pixel", "semantic"])
    words = model.words.convert_ids_to_tokens(spelled(model, pictures(1)).tolist())
    assert torch.equal(model.join(model.vision.see(pictures(1)).tokens), spelled(model, pictures(1)))
    assert (words[0], words[13], words[14]) == ("<pixel>", "</pixel>", "<semantic>")


def test_one_stream_can_be_left_out():
    model = make_codes("residual", streams=["pixel"])
    assert losses(model, to_image=ALWAYS)[1].shape == (4 * 4 * 3,)
    images, tokens = generate_image(model, CAPTIONS, generator=generators(4))
    assert set(tokens.ids) == {"pixel"}
    assert torch.equal(model.vision.tokenizer.decode(tokens), images)


def test_live_tokens_alone_are_read():
    model = make_codes(zoo.load_tokenizer("karl-tiny"))
    images = next(iter(Loader(scenes("val"), batch_size=3)))["image"]
    tokens = model.vision.tokenizer.encode(images)
    assert len(set(tokens.lengths.tolist())) > 1
    row = model.join(model.vision.see(images).tokens[0])
    assert torch.equal(row[1:-1] - model.vocabulary.code_ids("image").start, tokens.ids["image"][0][tokens.mask[0]])
    texts = generate_text(model, images, max_new_tokens=6)
    assert texts == [generate_text(model, image[None], max_new_tokens=6)[0] for image in images]
    with pytest.raises(ZooError, match=r"writes no images: tokens of variable length .* set num_tokens"):
        generate_image(model, ["red"])


def test_a_fixed_number_of_tokens_of_a_tokenizer_of_variable_length_is_written():
    model = make_codes(zoo.load_tokenizer("karl-tiny"), num_tokens=6)
    images, tokens = generate_image(model, CAPTIONS[:2], generator=generators(2))
    assert tokens.ids["image"].shape == (2, 6)
    assert images.shape == (2, 3, 64, 64)
    row = model.join(model.vision.see(images).tokens[0])
    assert len(row) == 1 + 6 + 1


# Files


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("plain", {"streams": OWN_WORDS}), ("residual", {"streams": ["pixel", "semantic"], "bos": True})],
)
def test_a_saved_model_comes_back(tmp_path, kind, settings):
    model = make_codes(kind, **settings)
    model.save(tmp_path)
    loaded = VisualLM.load(tmp_path)
    assert not loaded.training
    assert loaded.vision.streams == model.vision.streams
    assert loaded.bos == model.bos
    assert loaded.vocabulary.words == model.vocabulary.words
    for ours, theirs in zip(losses(loaded), losses(model), strict=True):
        assert torch.equal(ours, theirs)
    written = [generate_image(one, CAPTIONS, generator=generators(4)).images for one in (model, loaded)]
    assert torch.equal(*written)


def test_a_folder_holds_the_kind_that_was_saved_last(tmp_path):
    make().save(tmp_path)
    make_codes(zoo.load_tokenizer("karl-tiny"), num_tokens=6).save(tmp_path)
    assert VisualLM.load(tmp_path).vision.num_tokens == 6
    make().save(tmp_path)
    assert VisualLM.load(tmp_path).vision.kind == "flow"


# Writing


@torch.no_grad()
def recomputed(model, prompt, image, scales, do_sample):
    """The words of an image of one prompt: every row by itself and from its beginning in every step, nothing cached."""
    text, tokens = model.text_ids(prompt), None if image is None else model.vision.tokenizer.encode(image)
    pieces = [[text], [[]]] if image is None else [[tokens, text], [[]], [tokens]]
    begin = model.vocabulary.id_of(model.vision.streams[0].begin)
    rows = [torch.cat([model.join(*piece), torch.tensor([begin])]) for piece in pieces]
    shape = spelled(model, pictures(1))[1:-1]  # which place is of which stream and level
    draws = torch.rand(len(shape), generator=generators(1)[0]).double()
    for number, place in enumerate(shape.tolist()):
        words = [place]
        for stream in model.vision.streams:
            codes = model.vocabulary.code_ids(stream.name)
            if place in codes:
                level = (place - codes.start) // stream.size
                words = list(range(codes.start + level * stream.size, codes.start + (level + 1) * stream.size))
        v = [model.lm(row[None]).logits[0, -1, words] for row in rows]
        guided = v[1] + scales[0] * (v[0] - v[1])
        if image is not None:
            guided = v[1] + scales[1] * (v[2] - v[1]) + scales[0] * (v[0] - v[2])
        chosen = pick(guided[None], draws[number : number + 1] if do_sample else None, top_p=0.9)
        rows = [torch.cat([row, torch.tensor([words[chosen]])]) for row in rows]
    return rows[0][-len(shape) :]


@pytest.mark.parametrize("scales", [(1.0, 1.0), (3.0, 1.5)])
@pytest.mark.parametrize("image", [None, pictures(1)], ids=["text", "editing"])
@pytest.mark.parametrize(("kind", "do_sample"), [("plain", True), ("residual", False)])
def test_generation_with_a_cache_equals_recomputation_without(kind, scales, image, do_sample):
    model = make_codes(kind, bos=True)
    names = dict(zip(("text_scale", "image_scale"), scales, strict=True))
    settings = names | {"do_sample": do_sample, "top_p": 0.9, "generator": generators(1)}
    found = generate_image(model, CAPTIONS[:1], image, **settings)
    written = model.join(found.tokens)[2:-1]
    assert torch.equal(written, recomputed(model, CAPTIONS[0], image, scales, do_sample))
    assert torch.equal(model.vision.tokenizer.decode(found.tokens), found.images)


@pytest.mark.parametrize("images", [None, pictures(4)], ids=["text", "editing"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_its_prompts_one_by_one(kind, images):
    model = make_codes(kind)
    batch = generate_image(model, CAPTIONS, images, text_scale=2.0, generator=generators(4))
    for i, prompt in enumerate(CAPTIONS):
        image = None if images is None else images[i : i + 1]
        alone = generate_image(model, [prompt], image, text_scale=2.0, generator=[generators(4)[i]])
        for name, ids in alone.tokens.ids.items():
            assert torch.equal(ids[0], batch.tokens.ids[name][i])
        torch.testing.assert_close(alone.images[0], batch.images[i], rtol=1e-4, atol=1e-4)


def test_prompts_draws_and_settings_decide_the_image():
    model = make_codes(std=0.3)
    written = lambda prompts=CAPTIONS, **settings: generate_image(model, prompts, **settings).tokens.ids["image"]  # noqa: E731
    greedy = written(do_sample=False)
    assert torch.equal(greedy, written(do_sample=False))
    assert len({tuple(row) for row in greedy.tolist()}) > 1
    assert torch.equal(written(top_p=1e-9, generator=torch.Generator().manual_seed(0)), greedy)
    assert torch.equal(written(temperature=1e-6, generator=torch.Generator().manual_seed(0)), greedy)
    same, other = (written(generator=torch.Generator().manual_seed(seed), top_p=1.0) for seed in (0, 1))
    assert torch.equal(written(generator=torch.Generator().manual_seed(0), top_p=1.0), same)
    assert not torch.equal(same, other)
    first, second = written(CAPTIONS[:1] * 2, generator=generators(2), top_p=1.0)
    assert not torch.equal(first, second)
    assert not torch.equal(written(do_sample=False, text_scale=5.0), greedy)


def test_a_draw_takes_its_share_of_the_most_likely_words():
    torch.manual_seed(0)
    scores = torch.randn(1, 20)
    draws = (torch.arange(20_000) + 0.5) / 20_000
    for temperature, top_p in ((1.0, 0.5), (0.7, 0.9), (2.0, 1.0)):
        found = pick(scores.expand(20_000, -1), draws.double(), temperature, top_p)
        expected = TopPLogitsWarper(top_p)(None, scores / temperature).softmax(1)[0]
        torch.testing.assert_close(found.bincount(minlength=20) / 20_000, expected, rtol=0, atol=2e-4)
    ties = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]])
    assert pick(ties).tolist() == [1, 0]
    last = torch.tensor([math.nextafter(1.0, 0.0)] * 2).double()
    assert pick(torch.tensor([[0.0, -math.inf, 0.0]] * 2), last).tolist() == [2, 2]


@torch.no_grad()
def test_a_greedy_caption_equals_recomputation_without_a_cache():
    model, image = make_codes("residual", bos=True), pictures(1)
    start = torch.tensor([model.words.bos_token_id])
    row = torch.cat([start, spelled(model, image), torch.tensor(model.text_ids("a small"))])
    for _ in range(8):
        row = torch.cat([row, model.lm(row[None]).logits[0, -1, : model.vocabulary.text_size].argmax()[None]])
    written, end = row[-8:].tolist(), model.words.eos_token_id
    written = written[: written.index(end)] if end in written else written
    expected = model.words.decode(written, skip_special_tokens=True)
    assert generate_text(model, image, "a small", max_new_tokens=8) == [expected]


def test_words_of_images_are_never_said():
    model = make_codes(lm="llama")
    with torch.no_grad():
        model.lm.get_output_embeddings().weight[-14:].mul_(100)
    assert "image" not in "".join(generate_text(model, pictures(4), max_new_tokens=8))


# What is refused


def with_plain_words():
    model = make_codes()
    return VisualLM(model.lm, text_words(), model.vision)


def broken(path):
    (path / "codes.json").write_text("{}")
    return VisualLM.load(path)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: CodeVision(zoo.create_tokenizer("kl-tiny")), "kl-tiny has latents and no ids"),
        (lambda: CodeVision(code_tokenizer(), ["imag"]), "no stream 'imag'; did you mean image"),
        (lambda: CodeVision(code_tokenizer(), "pixel"), "no stream 'pixel'; there are: image"),
        (lambda: CodeVision(code_tokenizer(), [Stream("image", 9, "<{}>", begin="<", end=">")]), "words for 9 codes"),
        (lambda: CodeVision(code_tokenizer(), [Stream("image", 12, "<{}>")]), "needs begin= and end="),
        (lambda: make_codes("residual", streams=["pixel", "pixel"]), "come twice: "),
        (lambda: make_codes(num_tokens=3), "num_tokens is for tokenizers of variable length"),
        (lambda: CodeVision(zoo.create_tokenizer("karl-tiny"), num_tokens=0), "at least 1, got 0"),
        (lambda: make_codes(head=FlowHeadConfig()), "a flow head writes latents, and vqgan-tiny has ids"),
        (lambda: make_codes(zoo.create_tokenizer("kl-tiny")), "kl-tiny has latents, which need a head"),
        (lambda: make_codes(zoo.create_tokenizer("mingtok-tiny")), "need a head to write them"),
        (
            lambda: VisualLM.create(Qwen2Config(**CODE_SIZES), text_words(), code_tokenizer(), bos=True),
            "no bos_token to begin with",
        ),
        (with_plain_words, r"must be <image>, </image>, <image_0>, ..., <image_11>; VisualLM.create adds them"),
        (lambda: losses(make_codes(), texts=["an <image_3>", *CAPTIONS[1:]]), "ids of text must be in"),
        (lambda: make_codes().join(Tokens(ids={"image": torch.tensor([[12]])})), r"codes of stream 'image' .* 0\.\.11"),
        (
            lambda: losses(make_codes("residual", lm={"max_position_embeddings": 24})),
            "an image of 24 words and a text do not fit into a context",
        ),
        (lambda: make()(CAPTIONS, pictures(4), TO_IMAGE, DROPPED, all_words=True), "all_words is for images of words"),
    ],
)
def test_what_does_not_fit_is_refused(call, complaint):
    with pytest.raises(ZooError, match=complaint):
        call()


def test_a_broken_file_is_named(tmp_path):
    with pytest.raises(ZooError, match=r"codes.json is not what VisualLM.save wrote"):
        broken(tmp_path)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda m: generate_image(m, ["red", ""]), "prompt 1 is empty"),
        (lambda m: generate_image(m, ["red " * 90]), "longer than the context of 96; shorten the prompt"),
        (lambda m: generate_image(m, ["red"], generator=generators(2)), "1 prompts take as many generators, got 2"),
        (lambda m: generate_image(m, ["red <image_3>"]), "ids of text must be in"),
        (lambda m: generate_image(m, ["red"], num_steps=3), "num_steps is for a flow head, and vqgan-tiny has ids"),
        (lambda m: generate_image(m, ["red"], temperature=0.0), "above 0 for ids, got 0.0; do_sample=False is greedy"),
        (lambda m: generate_image(m, ["red"], top_p=0.0), "top_p must be above 0 and at most 1, got 0.0"),
        (lambda m: generate_image(make(), ["red"], top_p=0.5), "for the ids of a discrete tokenizer, and mingtok-tiny"),
        (lambda m: generate_image(make(), ["red"], do_sample=False), "mingtok-tiny has latents"),
        (
            lambda m: generate_image(make_codes("residual", streams=["semantic"]), ["red"]),
            "dualtoken-tiny writes no images: pixels are decoded from the stream 'pixel', which is not among",
        ),
        (lambda m: generate_text(m, pictures(1), "red " * 90), "longer than the context of 96; shorten the prompt"),
        (lambda m: generate_text(m, 2 * pictures(1)), r"in \[0, 1\]"),
    ],
)
def test_what_cannot_be_generated_is_refused(call, complaint):
    with pytest.raises(ZooError, match=complaint):
        call(make_codes())

"""Images as codebook embeddings: what a visual language model reads, learns and writes of them."""

import pytest
import torch
import torch.nn.functional as F
from lm_helpers import CAPTIONS, LANGUAGE_MODELS, TOKENIZER, code_tokenizer, generators, make, make_codes, pictures

import zoo
from zoo import ZooError
from zoo.lm import EmbeddingConfig, VisualLM, generate_image, generate_text
from zoo.lm.codes import pick
from zoo.lm.training import started

READS, WRITES = EmbeddingConfig(), EmbeddingConfig(visual_head=True)
MARKED = EmbeddingConfig(visual_head=True, marks=True)
ALWAYS, NEVER = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)
N = 4
"""Places of an image."""


def made(kind="plain", embeddings=READS, **settings):
    return make_codes(kind, embeddings=embeddings, **settings)


def read(model, images):
    """What stands at the places of images, by the contract of the tokenizer and the three layers of the projector."""
    codes = model.vision.tokenizer.embed(model.vision.tokenizer.encode(images))
    first, _, last = model.vision.projector
    return last(F.gelu(first(codes)))


def hidden(model, *inputs):
    """The last hidden states (T, hidden_size) of a sequence of inputs (n, hidden_size)."""
    return model.lm(inputs_embeds=torch.cat(inputs)[None], output_hidden_states=True).hidden_states[-1][0]


def words(model, text):
    return torch.tensor(model.text_ids(text))


def embedded(model, ids):
    return model.lm.get_input_embeddings()(torch.as_tensor(ids))


@pytest.mark.parametrize("kind", ["plain", "residual"])
@pytest.mark.parametrize("lm", LANGUAGE_MODELS)
@torch.no_grad()
def test_a_caption_and_its_end_are_predicted_from_the_last_embedding_on(kind, lm):
    model, image = made(kind, lm=lm), pictures(1)
    ids = torch.cat([words(model, CAPTIONS[1]), torch.tensor([model.words.eos_token_id])])
    scores = model.lm.get_output_embeddings()(hidden(model, read(model, image)[0], embedded(model, ids)))
    text, codes = model([CAPTIONS[1]], image, NEVER[:1], NEVER[:1])
    torch.testing.assert_close(text, F.cross_entropy(scores[N - 1 : -1], ids, reduction="none"))
    assert codes.shape == (0,)


@torch.no_grad()
def test_codes_are_predicted_by_the_head_from_the_last_word_on():
    model, image = made(embeddings=WRITES), pictures(1)
    states = hidden(model, embedded(model, words(model, "red")), read(model, image)[0])
    before = len(words(model, "red")) - 1
    ids = model.vision.tokenizer.encode(image).ids["image"][0]
    expected = F.cross_entropy(model.vision.visual_head(states[before:-1]), ids, reduction="none")
    text, codes = model(["red"], image, ALWAYS[:1], NEVER[:1])
    torch.testing.assert_close(codes, expected)
    assert text.shape == (0,)


@torch.no_grad()
def test_marks_stand_around_an_image_and_begin_one_without_its_text():
    model, image = made(embeddings=MARKED), pictures(1)
    begin, end = (model.vocabulary.id_of(word) for word in ("<image>", "</image>"))
    states = hidden(model, embedded(model, [begin]), read(model, image)[0], embedded(model, [end]))
    ids = model.vision.tokenizer.encode(image).ids["image"][0]
    _, codes = model(["red"], image, ALWAYS[:1], ALWAYS[:1])
    torch.testing.assert_close(codes, F.cross_entropy(model.vision.visual_head(states[:N]), ids, reduction="none"))
    assert model.lm.config.vocab_size == model.vocabulary.text_size + 2


def test_nothing_is_added_to_the_words_of_the_language_model():
    model = made()
    assert model.lm.config.vocab_size == model.vocabulary.text_size


@torch.no_grad()
def test_a_prompt_is_read_and_not_learned():
    model, image = made(), pictures(1)
    prompt, answer = words(model, "how many?"), torch.tensor([*model.text_ids("two"), model.words.eos_token_id])
    inputs = read(model, image)[0], embedded(model, prompt), embedded(model, answer)
    scores = model.lm.get_output_embeddings()(hidden(model, *inputs))[N + len(prompt) - 1 : -1]
    text, _ = model(["two"], image, NEVER[:1], NEVER[:1], prompts=["how many?"])
    torch.testing.assert_close(text, F.cross_entropy(scores, answer, reduction="none"))


@torch.no_grad()
def test_a_padded_batch_of_both_directions_equals_its_pairs_one_by_one():
    model, to_image = made(embeddings=WRITES), torch.tensor([True, False, False, True])
    together = model(CAPTIONS, pictures(4), to_image, NEVER)
    alone = [
        model(CAPTIONS[i : i + 1], pictures(4)[i : i + 1], to_image[i : i + 1], NEVER[:1]) for i in range(len(CAPTIONS))
    ]
    for found, expected in zip(together, map(torch.cat, zip(*alone, strict=True)), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("to_image", [ALWAYS, NEVER])
def test_the_tokenizer_is_frozen_and_the_rest_learns(to_image):
    model = made(embeddings=WRITES)
    sum(loss.sum() for loss in model(CAPTIONS, pictures(4), to_image, NEVER)).backward()
    idle = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert {name.split(".")[1] for name in idle} <= ({"tokenizer"} if to_image[0] else {"tokenizer", "visual_head"})
    assert any(name.startswith("vision.tokenizer") for name in idle)


def test_codes_that_are_given_are_read_with_gradient():
    model, codes = made(), torch.randn(4, N, 32, requires_grad=True)
    text, _ = model(CAPTIONS, model.vision.seen(codes), NEVER, NEVER)
    text.sum().backward()
    assert (codes.grad.abs().sum(2) > 0).all()


@pytest.mark.parametrize(("kind", "embeddings"), [("plain", WRITES), ("plain", MARKED), ("residual", READS)])
@torch.no_grad()
def test_a_saved_model_comes_back(tmp_path, kind, embeddings):
    model = made(kind, embeddings)
    model.save(tmp_path)
    loaded = VisualLM.load(tmp_path)
    assert loaded.vision.config == embeddings
    one, two = (m(CAPTIONS, pictures(4), NEVER, NEVER)[0] for m in (model, loaded))
    assert torch.equal(one, two)
    if embeddings.visual_head:
        one, two = (generate_image(m, CAPTIONS, generator=generators(4)).images for m in (model, loaded))
        assert torch.equal(one, two)


def test_a_model_goes_on_and_may_get_a_head(tmp_path):
    model = made()
    model.save(tmp_path)
    tokenizer = model.vision.tokenizer
    assert started(tmp_path, tokenizer, READS).vision.visual_head is None
    more = started(tmp_path, tokenizer, WRITES)
    assert more.training
    assert more.vision.visual_head.weight.shape == (12, 24)
    assert torch.equal(more.vision.projector[0].weight, model.vision.projector[0].weight)
    with pytest.raises(ZooError, match="reads images with embeddings"):
        started(tmp_path, tokenizer, None)
    with pytest.raises(ZooError, match="choose its tokenizer"):
        started(tmp_path, zoo.create_tokenizer("vqgan-tiny"), READS)


# Writing


@pytest.mark.parametrize(("embeddings", "scale"), [(WRITES, 1.0), (MARKED, 1.0), (MARKED, 3.0)])
@torch.no_grad()
def test_generation_with_a_cache_equals_recomputation_without(embeddings, scale):
    model = made(embeddings=embeddings)
    mark = [model.vocabulary.id_of("<image>")] if embeddings.marks else []
    begin = embedded(model, torch.tensor(mark, dtype=torch.int64))
    rows = [torch.cat([embedded(model, words(model, CAPTIONS[1])), begin]), begin]
    draws, ids = torch.rand(N, generator=generators(1)[0]).double(), []
    for draw in draws:
        one, *other = (model.vision.visual_head(hidden(model, row)[-1]) for row in rows[: 2 if scale != 1 else 1])
        scores = other[0] + scale * (one - other[0]) if other else one
        ids.append(pick(scores[None], draw[None], top_p=0.9, top_k=7))
        vector = model.vision.tokenizer.quantizer.codes(ids[-1])
        rows = [torch.cat([row, model.vision.projector(vector)]) for row in rows]
    settings = {"text_scale": scale, "top_p": 0.9, "top_k": 7, "generator": generators(1)}
    found = generate_image(model, CAPTIONS[1:2], **settings)
    assert torch.equal(found.tokens.ids["image"][0], torch.cat(ids))
    assert torch.equal(model.vision.tokenizer.decode(found.tokens), found.images)


def test_the_one_most_likely_code_is_the_greedy_one():
    model = made(embeddings=WRITES)
    drawn = generate_image(model, CAPTIONS, top_k=1, generator=generators(4)).tokens.ids["image"]
    assert torch.equal(drawn, generate_image(model, CAPTIONS, do_sample=False).tokens.ids["image"])


@torch.no_grad()
def test_a_greedy_caption_equals_recomputation_without_a_cache():
    model = made(std=0.5)
    inputs, said = read(model, pictures(1))[0], []
    for _ in range(5):
        scores = model.lm.get_output_embeddings()(hidden(model, inputs)[-1])
        said.append(scores.argmax())
        inputs = torch.cat([inputs, embedded(model, said[-1:])])
    settings = {"max_new_tokens": 5, "min_new_tokens": 5}
    assert generate_text(model, pictures(1), **settings) == [model.words.decode(said, skip_special_tokens=True)]


# Refusals


def generate(model, **settings):
    return generate_image(model, CAPTIONS, **settings)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: made(zoo.create_tokenizer("mingtok-tiny", **TOKENIZER)), "has continuous tokens and no codebook"),
        (lambda: made(zoo.load_tokenizer("karl-tiny")), "variable length; say with num_tokens"),
        (lambda: made(num_tokens=3), "num_tokens is for tokenizers of variable length"),
        (lambda: made("residual", WRITES), "writes one id a position"),
        (lambda: made(streams=["image"]), "leave streams out"),
        (lambda: generate(made()), "writes no images: it has no visual head"),
        (lambda: generate(made(embeddings=WRITES), text_scale=2.0), "guidance needs a word before an image"),
        (lambda: generate(made(embeddings=WRITES), top_k=0), "top_k must be an integer of at least 1"),
        (lambda: generate(make(), top_k=3), "do_sample, top_p and top_k are for the ids"),
        (lambda: made()(CAPTIONS, pictures(4), ALWAYS, NEVER), "images are not written: it has no visual head"),
        (lambda: made(embeddings=WRITES)(CAPTIONS, pictures(4), ALWAYS, ALWAYS), "needs a word to begin with"),
        (lambda: made()(["red", "", "a", "b"], pictures(4), NEVER, NEVER), "text 1 of the batch is empty"),
        (
            lambda: made()(["a"], pictures(1), NEVER[:1], NEVER[:1], prompts=["word " * 200]),
            "an image of 4 words, a prompt of .* and a text do not fit into a context of 96",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, complaint):
    with pytest.raises(ZooError, match=complaint):
        call()


def test_a_language_model_without_rows_for_its_text_is_refused():
    model = made()
    model.lm.resize_token_embeddings(20)
    with pytest.raises(ZooError, match="the language model has 20 words and the text tokenizer"):
        VisualLM(model.lm, model.words, model.vision)


def test_the_projector_of_another_width_is_refused():
    wide = made(lm={"hidden_size": 32})
    with pytest.raises(ZooError, match="projector leads to hidden_size 32 and the language model has 24"):
        VisualLM(made().lm, wide.words, wide.vision)


def test_embeddings_are_what_the_ids_stand_for():
    for kind in ("plain", "residual"):
        tokenizer = code_tokenizer(kind)
        tokens = tokenizer.encode(pictures(2))
        found = tokenizer.embed(tokens)
        assert found.shape == (2, N, tokenizer.info.embedding_dim)
    parts = tokenizer.code_embeddings(tokens)
    expected = torch.cat([parts[name].sum(2) for name in tokenizer.info.streams], dim=2)
    torch.testing.assert_close(found, expected)

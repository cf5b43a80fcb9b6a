"""What a visual language model reads, and what it has to predict where."""

import pytest
import torch
import torch.nn.functional as F
from lm_helpers import CAPTIONS, HEAD, LANGUAGE_MODELS, SIZES, TOKENIZER, N, draws, make, pictures
from transformers import LlamaConfig, Qwen2Config, Qwen2ForCausalLM

import zoo
from zoo import ZooError
from zoo.lm import FlowVision, VisualLM
from zoo.lm.text import train_text_tokenizer
from zoo.tokenizers.mingtok.head import FlowHead, FlowHeadConfig

TO_IMAGE = torch.tensor([True, False, False, True])
DROPPED = torch.tensor([False, True, False, True])


@torch.no_grad()
def losses(model, rows=slice(None), to_image=TO_IMAGE, dropped=DROPPED, texts=CAPTIONS):
    t, noise = draws(4)
    return model(texts[rows], pictures(4)[rows], to_image[rows], dropped[rows], t[rows], noise[rows])


def pieces(model, text):
    """Embedded text, <image>, </image>."""
    embed = model.lm.get_input_embeddings()
    ids = torch.tensor(model.text_ids(text))
    return ids, embed(ids), *(embed(torch.tensor([model.vocabulary.id_of(w)])) for w in ("<image>", "</image>"))


@pytest.mark.parametrize("lm", LANGUAGE_MODELS)
@torch.no_grad()
def test_the_state_at_the_mark_predicts_the_first_latent_and_each_feature_the_next(lm):
    model, image, (t, noise) = make(lm), pictures(4)[:1], draws(4)
    ids, text, begin, end = pieces(model, CAPTIONS[0])
    tokenizer, head = model.vision.tokenizer, model.vision.head
    sequence = torch.cat([text, begin, head.project(tokenizer.features(image))[0], end])
    hidden = model.lm.base_model(inputs_embeds=sequence[None]).last_hidden_state[0]
    latents = tokenizer.encode(image).latents["image"][0]
    expected = head.loss(head.condition(hidden[len(ids) : len(ids) + N]), latents, t[0], noise[0])
    words, flow = losses(model, slice(0, 1))
    torch.testing.assert_close(flow, expected)
    assert words.shape == (0,)


@pytest.mark.parametrize("lm", LANGUAGE_MODELS)
@torch.no_grad()
def test_a_caption_and_its_end_are_predicted_from_what_comes_before(lm):
    model, image = make(lm), pictures(4)[1:2]
    ids, text, begin, end = pieces(model, CAPTIONS[1])
    features = model.vision.head.project(model.vision.tokenizer.features(image))[0]
    logits = model.lm(inputs_embeds=torch.cat([begin, features, end, text])[None]).logits[0, N + 1 :]
    targets = torch.cat([ids, torch.tensor([model.words.eos_token_id])])
    words, flow = losses(model, slice(1, 2))
    torch.testing.assert_close(words, F.cross_entropy(logits, targets, reduction="none"))
    assert flow.shape == (0,)


def test_a_padded_batch_of_both_directions_equals_its_pairs_one_by_one():
    model = make()
    whole, alone = losses(model), [losses(model, slice(i, i + 1)) for i in range(4)]
    for together, parts in zip(whole, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(together, torch.cat(parts), rtol=1e-4, atol=1e-5)
    assert len(whole[1]) == 2 * N


@pytest.mark.parametrize("lm", LANGUAGE_MODELS)
@torch.no_grad()
def test_a_dropped_text_is_one_that_the_attention_mask_hides(lm):
    model, (t, noise) = make(lm), draws(4)
    inputs, latents = model.vision.see(pictures(4)[:1])[1:]
    text = model.text_ids(CAPTIONS[0])
    ids, live = model.pad([model.join(text, N)], "right")
    live[:, : len(text)] = False
    hidden = model.run(model.embed(ids, inputs), live, keep=1).hidden_states[-1][0, len(text) : len(text) + N]
    hidden_text = model.vision.loss(hidden, latents[0], t[0], noise[0])
    dropped, kept = (losses(model, slice(0, 1), dropped=torch.full((4,), drop))[1] for drop in (True, False))
    torch.testing.assert_close(dropped, hidden_text)
    assert not torch.allclose(kept, hidden_text, rtol=1e-3)


def test_training_cuts_off_a_text_that_is_longer_than_the_context():
    model = make()
    texts = ["red " * 100, "blue " * 100, *CAPTIONS[2:]]
    room = model.context - N - 3
    ends = len(model.text_ids(CAPTIONS[2])) + 1
    words, _ = losses(model, texts=texts)
    assert len(words) == room + 1 + ends
    shortened = [model.words.decode(model.text_ids(text)[:room]) for text in texts]
    torch.testing.assert_close(words, losses(model, texts=shortened)[0])


def test_the_visual_tokenizer_is_frozen_and_all_else_learns():
    model = make()
    sum(loss.sum() for loss in model(CAPTIONS, pictures(4), TO_IMAGE, DROPPED, *draws(4))).backward()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {f"vision.tokenizer.{name}" for name, _ in model.vision.tokenizer.named_parameters()}
    assert all((p.grad is None) == (name in frozen) for name, p in model.named_parameters())


@pytest.mark.parametrize("to_image", [True, False])
def test_a_batch_of_one_direction_still_reaches_every_parameter(to_image):
    """Ranks of DDP wait for the gradient of each parameter."""
    model = make()
    sum(loss.sum() for loss in model(CAPTIONS, pictures(4), torch.full((4,), to_image), DROPPED, *draws(4))).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_saved_model_comes_back_with_its_words_and_sizes(tmp_path):
    model = make(captions=["1234 " * 9], depth=2)  # Qwen2's own tokenizer has no words of several digits
    model.save(tmp_path / "model")
    loaded = VisualLM.load(tmp_path / "model")
    assert not loaded.training
    assert loaded.vision.head.config == model.vision.head.config
    assert loaded.vision.tokenizer.config == model.vision.tokenizer.config
    for text in (*CAPTIONS, "Ünïcode 1234, it's <|endoftext|>"):
        assert loaded.text_ids(text) == model.text_ids(text)
    for ours, theirs in zip(losses(loaded), losses(model), strict=True):
        assert torch.equal(ours, theirs)
    assert VisualLM.load(tmp_path / "model", dtype=torch.bfloat16).lm.dtype == torch.bfloat16
    assert not list(tmp_path.rglob("*.bin"))


@pytest.mark.parametrize(("spare", "left"), [(0, 0), (50, 47)])
def test_a_trained_language_model_keeps_its_weights_and_gains_rows_where_it_has_none_to_spare(tmp_path, spare, left):
    words = train_text_tokenizer(CAPTIONS, 280)
    count = len(words)
    lm = Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=1, vocab_size=count + spare))
    lm.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    model = VisualLM.create(tmp_path, str(tmp_path), *parts()[2:])
    weight = model.lm.get_input_embeddings().weight
    assert torch.equal(weight[:count], lm.get_input_embeddings().weight[:count])
    assert len(weight) - len(model.words) == left


def parts(**head):
    words, tokenizer = train_text_tokenizer(CAPTIONS, 280), zoo.create_tokenizer("mingtok-tiny", **TOKENIZER)
    return LANGUAGE_MODELS["qwen2"], words, tokenizer, FlowHeadConfig(**HEAD | head)


def of_plain_words():
    _, _, tokenizer, head = parts()
    model = VisualLM.create(*parts())
    return VisualLM(model.lm, train_text_tokenizer(CAPTIONS, 280), FlowVision(tokenizer, FlowHead(head)))


def of_a_language_model_without_their_rows():
    model = VisualLM.create(*parts())
    model.lm.resize_token_embeddings(len(model.words) - 3)
    return VisualLM(model.lm, model.words, model.vision)


def of_words_without_an_end():
    model = VisualLM.create(*parts())
    model.words.eos_token = None
    return VisualLM(model.lm, model.words, model.vision)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: VisualLM.create(*parts(feature_dim=48)), "feature_dim 48 and mingtok-tiny needs 32; set head.feature"),
        (lambda: VisualLM.create(*parts(latent_dim=8)), "latent_dim 8 and mingtok-tiny needs 4"),
        (lambda: VisualLM.create(*parts(hidden_size=32)), "hidden_size 32 and the language model 24"),
        (of_plain_words, "must be <image>, </image>, <imagePatch>; VisualLM.create adds them"),
        (of_a_language_model_without_their_rows, r"has \d+ words and the text tokenizer \d+; extend it"),
        (of_words_without_an_end, "no eos_token"),
        (lambda: VisualLM.create("/nowhere", *parts()[1:]), "'/nowhere'.*give a hub id or a folder"),
        (lambda: VisualLM.load("/nowhere"), "no folder that VisualLM.save wrote"),
        (lambda: losses(make(), texts=["an <image>", *CAPTIONS[1:]]), "ids of text must be in"),
        (lambda: losses(make(LlamaConfig(**SIZES | {"max_position_embeddings": 7}))), "do not fit into a context of 7"),
        (lambda: train_text_tokenizer(CAPTIONS, 100), "at least 257"),
    ],
)
def test_what_does_not_fit_is_refused(call, complaint):
    with pytest.raises(ZooError, match=complaint):
        call()

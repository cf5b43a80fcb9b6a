"""Images from texts, and texts from images."""

import pytest
import torch
from lm_helpers import CAPTIONS, N, generators, make, pictures

from zoo import ZooError
from zoo.lm import generate_image, generate_text


@torch.no_grad()
def recomputed(model, prompt, image, text_scale, image_scale):
    """Latents (N, C) of one prompt: every row by itself and from its beginning in every step, nothing cached."""
    vision, text = model.vision, model.text_ids(prompt)
    begin = torch.tensor([model.vocabulary.id_of("<image>")])
    read = lambda inputs, *pieces: model.embed(torch.cat([model.join(*pieces), begin])[None], inputs)  # noqa: E731
    if image is None:
        rows = [read(None, text), read(None, [])]
    else:
        inputs = vision.see(image).inputs
        rows = [read(inputs, N, text), read(None, []), read(inputs, N)]
    generator, latents = generators(1)[0], []
    for _ in range(N):
        if latents:
            written = vision.head.project(vision.tokenizer.features_of(torch.stack(latents, dim=1)))
        hidden = [
            model.lm.base_model(inputs_embeds=torch.cat([row, written], dim=1) if latents else row).last_hidden_state
            for row in rows
        ]
        z = [vision.head.condition(one[:, -1]) for one in hidden]
        noise = torch.randn(1, 4, generator=generator)
        latents.append(vision.head.sample(*z, text_scale=text_scale, image_scale=image_scale, noise=noise))
    return torch.cat(latents)


def latents(model, prompts, images=None, **settings):
    return generate_image(model, prompts, images, generator=generators(len(prompts)), **settings).tokens.latents[
        "image"
    ]


@pytest.mark.parametrize("lm", ["qwen2", "gpt2"])
@pytest.mark.parametrize("scales", [(3.0, 1.1), (1.0, 1.0), (1.0, 2.0)])
@pytest.mark.parametrize("image", [None, pictures(1)], ids=["text", "editing"])
def test_generation_with_caches_equals_recomputation_without(lm, scales, image):
    model = make(lm)
    found = latents(model, CAPTIONS[:1], image, text_scale=scales[0], image_scale=scales[1])
    torch.testing.assert_close(found[0], recomputed(model, CAPTIONS[0], image, *scales), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("images", [None, pictures(4)], ids=["text", "editing"])
def test_a_batch_equals_its_prompts_one_by_one(images):
    model = make()
    batch = generate_image(model, CAPTIONS, images, generator=generators(4))
    for i, prompt in enumerate(CAPTIONS):
        image = None if images is None else images[i : i + 1]
        alone = generate_image(model, [prompt], image, generator=[generators(4)[i]])
        torch.testing.assert_close(
            alone.tokens.latents["image"], batch.tokens[i].latents["image"], rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(alone.images[0], batch.images[i], rtol=1e-4, atol=1e-4)


def test_pictures_are_what_the_tokenizer_decodes_from_the_latents():
    model = make()
    images, tokens = generate_image(model, CAPTIONS, generator=torch.Generator().manual_seed(0))
    assert images.shape == (4, 3, 16, 16)
    assert tokens.grid == (2, 2)
    torch.testing.assert_close(images, model.vision.tokenizer.decode(tokens))


def test_scales_of_one_are_no_guidance_and_others_are_honoured():
    model, images = make(), pictures(4)
    plain = latents(model, CAPTIONS, text_scale=1.0)
    torch.testing.assert_close(latents(model, CAPTIONS, text_scale=1 + 1e-9), plain, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(latents(model, CAPTIONS, text_scale=3.0), plain, atol=1e-3)
    assert torch.equal(latents(model, CAPTIONS, text_scale=3.0), latents(model, CAPTIONS))
    assert torch.equal(latents(model, CAPTIONS, image_scale=5.0), latents(model, CAPTIONS))  # there is no image
    edited = latents(model, CAPTIONS, images, text_scale=1.0, image_scale=1.0)
    almost = latents(model, CAPTIONS, images, text_scale=1.0, image_scale=1 + 1e-9)
    torch.testing.assert_close(almost, edited, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(latents(model, CAPTIONS, images, text_scale=1.0, image_scale=3.0), edited, atol=1e-3)


def test_prompts_and_draws_decide_the_image():
    model = make()
    same = [torch.Generator().manual_seed(0) for _ in range(2)]
    first, second = generate_image(model, CAPTIONS[:2], generator=same).tokens.latents["image"]
    assert not torch.allclose(first, second, atol=1e-3)
    first, second = latents(model, CAPTIONS[:1] * 2)
    assert not torch.allclose(first, second, atol=1e-3)


@pytest.mark.parametrize("lm", ["qwen2", "gpt2"])
@torch.no_grad()
def test_a_greedy_caption_equals_recomputation_without_a_cache(lm):
    model, image = make(lm), pictures(1)
    row, inputs = model.join(N, model.text_ids("a small")), model.vision.see(image).inputs
    for _ in range(8):
        logits = model.lm(inputs_embeds=model.embed(row[None], inputs)).logits[0, -1, : model.vocabulary.text_size]
        row = torch.cat([row, logits.argmax()[None]])
    written = row[-8:].tolist()
    end = model.words.eos_token_id
    written = written[: written.index(end)] if end in written else written
    assert generate_text(model, image, "a small", max_new_tokens=8) == [model.words.decode(written)]


def test_captions_of_a_batch_are_those_of_its_images_and_differ():
    model, images = make(std=0.3), pictures(4)
    texts = generate_text(model, images, max_new_tokens=8)
    assert texts == [generate_text(model, image[None], max_new_tokens=8)[0] for image in images]
    assert len(set(texts)) > 1


def test_sampled_captions_follow_the_seed():
    model, images = make(), pictures(1).expand(4, -1, -1, -1)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(generate_text(model, images, max_new_tokens=8, do_sample=True, temperature=2.0))
    assert runs[0] == runs[1] != runs[2]
    assert len(set(runs[0])) > 1


def test_words_of_images_are_never_said():
    model = make("gpt2")
    with torch.no_grad():
        for row in model.lm.get_output_embeddings().weight[-3:]:
            row.copy_(100 * torch.randn(24))
    assert "mage" not in "".join(generate_text(model, pictures(4), max_new_tokens=8))


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda m: generate_image(m, ["red", ""]), "prompt 1 is empty"),
        (lambda m: generate_image(m, []), "at least one text, got \\[\\]"),
        (lambda m: generate_image(m, "red"), "at least one text, got 'red'"),
        (lambda m: generate_image(m, ["red " * 80]), "longer than the context of 64; shorten the prompt"),
        (lambda m: generate_image(m, ["red"], pictures(2)), "1 prompts take as many images, got 2"),
        (lambda m: generate_image(m, ["red"], generator=generators(2)), "1 prompts take as many generators, got 2"),
        (lambda m: generate_image(m, ["red"], num_steps=0), "num_steps must be an integer of at least 1"),
        (lambda m: generate_image(m, ["red <image>"]), "ids of text must be in"),
        (lambda m: generate_text(m, pictures(1), "red " * 80), "longer than the context of 64; shorten the prompt"),
        (lambda m: generate_text(m, pictures(1), max_new_tokens=100), "max_new_tokens 100 are longer than the context"),
    ],
)
def test_what_cannot_be_generated_is_refused(call, complaint):
    with pytest.raises(ZooError, match=complaint):
        call(make())

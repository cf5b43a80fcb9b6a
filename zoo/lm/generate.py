"""Text in, image out, and captions the other way round; see README.md for what the published loops do otherwise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from zoo.errors import ZooError, expect_integer, expect_number, one_line, shortened
from zoo.lm.model import VisualLM
from zoo.lm.vision import GeneratedImages, Generators

__all__ = ["GeneratedImages", "generate_image", "generate_text"]


@torch.no_grad()
def generate_image(
    model: VisualLM,
    prompts: Sequence[str],
    images: Tensor | None = None,
    text_scale: float | None = None,
    image_scale: float | None = None,
    temperature: float = 1.0,
    num_steps: int | None = None,
    generator: Generators = None,
    do_sample: bool = True,
    top_p: float | None = None,
    top_k: int | None = None,
) -> GeneratedImages:
    """An image for each prompt, one token after the other, each becoming what the model reads next.

    Of ids each is drawn from those words alone that can stand at its place, so that an image is always complete.

    The rows of guidance are the prompt, nothing (v_u) and, with images, the image without the text (v_t):
    v_u + text_scale (v - v_u), and v_u + image_scale (v_t - v_u) + text_scale (v - v_t), of velocities or of logits.
    Scales of 1 are no guidance, and take no rows.

    Args:
        prompts: B texts, none empty.
        images: (B, C, H, W) in [0, 1] before the prompts, for editing, by a model that was trained for it.
        text_scale: of what the text adds; default: 3 for latents, as in their published generation, and 1 for ids.
        image_scale: of what the images add; without images it has no effect. Default: 1.1 and 1, likewise.
        temperature: of latents, factor of their start noise; of ids, what logits are divided by.
        num_steps: of latents, calls of the flow head for each; default: config.num_steps of the head.
        generator: of what is drawn, on any device; a list has one for each prompt, so that an image does not depend
            on its batch.
        do_sample: of ids, False: the most likely one at each place.
        top_p: of ids, the most likely ones that have this share together are drawn from; default: 0.5 of ids that are
            words, as in the scripts of SEED-LLaMA, and 1 of those that are read as embeddings, as in ETT.
        top_k: of ids, so many of the most likely ones are drawn from; default: all.

    Raises:
        ZooError: an empty prompt, one too long for the context, another number of images or generators than of prompts,
            a model that writes no images, or settings that are not possible, or not for what it writes.
    """
    texts = _check(model, prompts, images, generator)
    for name, value in (("text_scale", text_scale), ("image_scale", image_scale), ("temperature", temperature)):
        if value is not None or name == "temperature":
            expect_number(name, value, 0)
    vision, count = model.vision, len(prompts)
    if vision.obstacle:
        raise ZooError(f"this model of {vision.tokenizer.info.name} writes no images: {vision.obstacle}.")
    text_scale = vision.text_scale if text_scale is None else text_scale
    image_scale = vision.image_scale if image_scale is None else image_scale
    seen = None if images is None else vision.see(vision.tokenizer.check_images(images))
    given = [()] * count if seen is None else [(seen.tokens[i],) for i in range(count)]
    # what each row of guidance reads, in the order of Vision.writer
    rows = [(*image, text) for image, text in zip(given, texts, strict=True)]
    copies = 1
    if text_scale != 1 or (seen is not None and image_scale != 1):
        rows += [([],)] * count + ([] if seen is None else given)
        copies = 2 if seen is None else 3
    mark = vision.streams[0].begin
    begin = torch.tensor([model.vocabulary.id_of(mark)] if mark else [], dtype=torch.int64)
    if copies > 1 and not (mark or model.bos):
        raise ZooError("guidance needs a word before an image without its text, and this model has none; use scale 1.")
    ids, live = model.pad([torch.cat([model.join(*row), begin]) for row in rows], "left")
    ids, live = ids.to(model.lm.device), live.to(model.lm.device)
    writer = vision.writer(
        model,
        count,
        copies,
        generator,
        text_scale=text_scale,
        image_scale=image_scale,
        temperature=temperature,
        num_steps=num_steps,
        do_sample=do_sample,
        top_p=top_p,
        top_k=top_k,
    )
    if ids.shape[1] + writer.length > model.context:
        raise ZooError(
            f"a prompt of {ids.shape[1]} positions and an image of {writer.length} are longer than the context of "
            f"{model.context}; shorten the prompt."
        )

    latent = seen is not None and seen.inputs is not None
    inputs = model.embed(ids, torch.cat([seen.inputs] * (2 if copies > 1 else 1)) if latent else None)
    cache = DynamicCache(config=model.lm.config)
    for _ in range(writer.length):
        inputs = writer.write(model.run(inputs, live, keep=1, cache=cache))
        live = F.pad(live, (0, 1), value=True)
    return writer.finish()


@torch.no_grad()
def generate_text(model: VisualLM, images: Tensor, prompt: str = "", max_new_tokens: int = 64, **settings) -> list[str]:
    """What the model says of each image (B, C, H, W) in [0, 1], after the prompt, which is not repeated.

    settings: of transformers' `generate`; greedy without any, do_sample=True, temperature=, top_p= for samples, drawn
    by torch's global generator. Words of images are never said.

    Raises ZooError where image, prompt and max_new_tokens do not fit into the context.
    """
    seen = model.vision.see(model.vision.tokenizer.check_images(images))
    if not isinstance(prompt, str):
        raise ZooError(f"prompt is a text, got {shortened(prompt)}.")
    expect_integer("max_new_tokens", max_new_tokens, 1)
    text = model.text_ids(prompt)
    ids, live = model.pad([model.join(seen.tokens[i], text) for i in range(len(images))], "left")
    if ids.shape[1] + max_new_tokens > model.context:
        raise ZooError(
            f"image and prompt of {ids.shape[1]} positions and max_new_tokens {max_new_tokens} are longer than the "
            f"context of {model.context}; shorten the prompt, or ask for fewer."
        )
    ids, live = ids.to(model.lm.device), live.to(model.lm.device)
    try:
        written = model.lm.generate(
            inputs_embeds=model.embed(ids, seen.inputs),
            attention_mask=live.long(),
            max_new_tokens=max_new_tokens,
            eos_token_id=model.words.eos_token_id,
            pad_token_id=model.words.eos_token_id,
            suppress_tokens=list(range(model.vocabulary.text_size, len(model.vocabulary))),
            **{"do_sample": False} | settings,
        )
    except Exception as error:
        if not settings:
            raise
        raise ZooError(f"transformers does not take the settings {shortened(settings)} ({one_line(error)}).") from error
    return model.words.batch_decode(written, skip_special_tokens=True)


def _check(model: VisualLM, prompts, images, generator) -> list[list[int]]:
    """The prompts as ids."""
    if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(one, str) for one in prompts):
        raise ZooError(f"prompts is a list of at least one text, got {shortened(prompts)}.")
    drawing = generator if isinstance(generator, (list, tuple)) else [generator]
    if not all(one is None or isinstance(one, torch.Generator) for one in drawing):
        raise ZooError(f"generator is a torch.Generator or a list of them, got {shortened(generator)}.")
    texts = [model.text_ids(prompt) for prompt in prompts]
    if not all(texts):
        raise ZooError(f"prompt {[bool(text) for text in texts].index(False)} is empty; say what to show.")
    if images is not None:
        model.vision.tokenizer.check_images(images)
    for name, values in (("images", images), ("generators", generator)):
        if isinstance(values, (Tensor, list, tuple)) and len(values) != len(prompts):
            raise ZooError(f"{len(prompts)} prompts take as many {name}, got {len(values)}.")
    return texts

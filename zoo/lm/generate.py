"""Text in, latents out, pixels out, and captions the other way round; see README.md for what the published loop does
otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from zoo.errors import ZooError
from zoo.lm.model import IMAGE, VisualLM
from zoo.tokenizer import Tokens


class GeneratedImages(NamedTuple):
    """Pictures, and the latents that were written."""

    images: Tensor
    """(B, 3, H, W) in [0, 1]."""
    tokens: Tokens
    """Normalised latents (B, N, C) of the stream "image"."""


@torch.no_grad()
def generate_image(
    model: VisualLM,
    prompts: Sequence[str],
    images: Tensor | None = None,
    text_scale: float = 3.0,
    image_scale: float = 1.1,
    temperature: float = 1.0,
    num_steps: int | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> GeneratedImages:
    """An image for each prompt: one latent after the other, each becoming the feature that the model reads next.

    The rows of guidance are the prompt, nothing (v_u) and, with images, the image without the text (v_t):
    v_u + text_scale (v - v_u), and v_u + image_scale (v_t - v_u) + text_scale (v - v_t). Scales of 1 are no guidance,
    and take no rows. The defaults are those of the published generation.

    Args:
        prompts: B texts, none empty.
        images: (B, 3, H, W) in [0, 1] before the prompts, for editing, by a model that was trained for it.
        text_scale: of what the text adds.
        image_scale: of what the images add; without images it has no effect.
        temperature: factor of the start noise of a latent.
        num_steps: calls of the flow head for a latent; default: config.num_steps of the head.
        generator: of the start noise, on any device; a list has one for each prompt, so that an image does not depend
            on its batch.

    Raises:
        ZooError: an empty prompt, one too long for the context, another number of images or generators than of prompts,
            or settings that are not possible.
    """
    tokenizer, head, count = model.vision.tokenizer, model.vision.head, len(prompts)
    texts = _check(model, prompts, images, generator)
    seen = None if images is None else model.vision.inputs(tokenizer.check_images(images))[0]
    given = () if seen is None else (seen.shape[1],)
    # what each row of guidance reads, in the order of FlowHead.sample
    kinds = [[(*given, text) for text in texts]]
    if text_scale != 1 or (given and image_scale != 1):
        kinds.append([([],)] * count)
        if given:
            kinds.append([given] * count)
    begin = torch.tensor([model.vocabulary.id_of(IMAGE.begin)])
    ids, live = model.pad([torch.cat([model.join(*row), begin]) for kind in kinds for row in kind], "left")
    ids, live = ids.to(model.lm.device), live.to(model.lm.device)
    length = tokenizer.info.max_tokens
    if ids.shape[1] + length > model.context:
        raise ZooError(
            f"a prompt of {ids.shape[1]} positions and an image of {length} are longer than the context of "
            f"{model.context}; shorten the prompt."
        )

    inputs = model.embed(ids, None if seen is None else torch.cat([seen] * (2 if len(kinds) > 1 else 1)))
    cache, features_cache = DynamicCache(config=model.lm.config), tokenizer.new_cache(count)
    latents, features = [], []
    for _ in range(length):
        hidden = model.run(inputs, live, keep=1, cache=cache).hidden_states[-1][:, -1]
        latent = head.sample(
            *head.condition(hidden).chunk(len(kinds)),
            text_scale=text_scale,
            image_scale=image_scale,
            temperature=temperature,
            num_steps=num_steps,
            noise=_noise((count, head.config.latent_dim), generator, hidden.device),
        )
        latents.append(latent)
        features.append(tokenizer.step(latent, features_cache))
        inputs = head.project(features[-1]).repeat(len(kinds), 1)[:, None]
        live = F.pad(live, (0, 1), value=True)
    side = tokenizer.config.grid
    tokens = Tokens(latents={"image": torch.stack(latents, dim=1)}, grid=(side, side))
    return GeneratedImages(tokenizer.decode_features(torch.stack(features, dim=1)), tokens)


@torch.no_grad()
def generate_text(model: VisualLM, images: Tensor, prompt: str = "", max_new_tokens: int = 64, **settings) -> list[str]:
    """What the model says of each image (B, 3, H, W) in [0, 1], after the prompt, which is not repeated.

    settings: of transformers' `generate`; greedy without any, do_sample=True, temperature=, top_p= for samples, drawn
    by torch's global generator. Words of images are never said.

    Raises ZooError where image, prompt and max_new_tokens do not fit into the context.
    """
    inputs = model.vision.inputs(model.vision.tokenizer.check_images(images))[0]
    row = model.join(inputs.shape[1], model.text_ids(prompt))
    if len(row) + max_new_tokens > model.context:
        raise ZooError(
            f"image and prompt of {len(row)} positions and max_new_tokens {max_new_tokens} are longer than the context "
            f"of {model.context}; shorten the prompt, or ask for fewer."
        )
    ids = row.expand(len(images), -1).to(model.lm.device)
    written = model.lm.generate(
        inputs_embeds=model.embed(ids, inputs),
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        eos_token_id=model.words.eos_token_id,
        pad_token_id=model.words.eos_token_id,
        suppress_tokens=[model.vocabulary.id_of(word) for word in IMAGE.words()],
        **{"do_sample": False} | settings,
    )
    return model.words.batch_decode(written, skip_special_tokens=True)


def _check(model: VisualLM, prompts, images, generator) -> list[list[int]]:
    """The prompts as ids."""
    if isinstance(prompts, str) or not prompts:
        raise ZooError(f"prompts is a list of at least one text, got {prompts!r}.")
    texts = [model.text_ids(prompt) for prompt in prompts]
    if not all(texts):
        raise ZooError(f"prompt {[bool(text) for text in texts].index(False)} is empty; say what to show.")
    for name, values in (("images", images), ("generators", generator)):
        if isinstance(values, (Tensor, list, tuple)) and len(values) != len(prompts):
            raise ZooError(f"{len(prompts)} prompts take as many {name}, got {len(values)}.")
    return texts


def _noise(shape: tuple[int, int], generator, device: torch.device) -> Tensor:
    if isinstance(generator, (list, tuple)):
        return torch.stack([torch.randn(shape[1:], device=g.device, generator=g) for g in generator]).to(device)
    return torch.randn(shape, device=generator.device if generator else device, generator=generator).to(device)

"""Class labels of unCLIP, by which SEED's embeddings become pixels: outputs of their reference case by name."""

from __future__ import annotations

from functools import partial

import torch
from diffusers import DDPMScheduler, StableUnCLIPImg2ImgPipeline
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from torch import Tensor
from vectors import Vectors

from zoo.tokenizers.seed.unclip import class_labels


@torch.no_grad()
def unclip_class_labels(vectors: Vectors, case: str) -> dict[str, Tensor]:
    given = partial(vectors.input, case)
    normalizer = StableUnCLIPImageNormalizer(given("mean").shape[1])
    normalizer.load_state_dict({"mean": given("mean"), "std": given("std")})
    parts = dict.fromkeys(
        ("feature_extractor", "image_encoder", "tokenizer", "text_encoder", "unet", "scheduler", "vae")
    )
    noising = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2")
    pipeline = StableUnCLIPImg2ImgPipeline(image_normalizer=normalizer, image_noising_scheduler=noising, **parts)
    labels = partial(class_labels, pipeline, given("image_embeds"), given("noise"))
    return {
        "level0": labels(0, guided=False),
        "level100": labels(100, guided=False),
        "cfg_zero": labels(),
        "cfg_negative": labels(negative=given("negative_embeds"), negative_noise=given("negative_noise")),
    }

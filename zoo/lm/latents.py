"""Images as latents that a flow head writes, as in Ming-UniVision (arXiv 2510.06590)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from zoo import registry, weights
from zoo.errors import ZooError
from zoo.lm.codes import encode_settings
from zoo.lm.vision import TOKENIZER_FILE, GeneratedImages, Generators, Seen, Vision, drawn, patches
from zoo.nn.cache import Cache
from zoo.tokenizer import Tokenizer, Tokens, config_fields, make_config
from zoo.tokenizers.mingtok.head import FlowHead, FlowHeadConfig
from zoo.tokenizers.mingtok.tokenizer import MingTokTokenizer
from zoo.vocabulary import latent_slot

if TYPE_CHECKING:
    from zoo.lm.model import VisualLM

IMAGE = latent_slot("image")


class FlowVision(Vision):
    """A frozen tokenizer of latents, and the head between it and the language model.

    An image in a sequence is <image>, one <imagePatch> for each latent, </image>. At a patch the model reads a
    projection instead of an embedded word: of the semantic feature that MingTok grows from the latents up to this one,
    and of the latent itself where another tokenizer has no such features. What it has read before a patch, at <image>
    or at the patch before, is the condition under which the head writes that patch's latent. Latents are those of the
    contract, normalised by the tokenizer.

    Args:
        tokenizer: of latents, in one stream.
        head: of the widths of `widths`.
        num_tokens: of a tokenizer of variable length: exactly so many of each image.

    Raises:
        ZooError: a tokenizer of ids, or of variable length without num_tokens, or widths that differ.
    """

    kind, FILE, spoken = "flow", "head.safetensors", False
    text_scale, image_scale = 3.0, 1.1  # of the published generation
    streams = (IMAGE,)

    def __init__(self, tokenizer: Tokenizer, head: FlowHead, num_tokens: int | None = None):
        super().__init__(tokenizer)
        info = tokenizer.info
        for field, ours in widths(tokenizer).items():
            if getattr(head.config, field) != ours:
                raise ZooError(
                    f"the flow head has {field} {getattr(head.config, field)} and {info.name} needs {ours}; "
                    f"set head.{field}."
                )
        if info.variable_length and num_tokens is None:
            raise ZooError(f"{info.name} has latents of variable length; say with num_tokens how many are used.")
        self.head, self.settings = head, encode_settings(info, num_tokens)
        self.num_tokens, self.length = num_tokens, num_tokens or info.max_tokens
        self.grown = isinstance(tokenizer, MingTokTokenizer)  # whether latents have features

    def check(self, hidden_size: int) -> None:
        if self.head.config.hidden_size != hidden_size:
            raise ZooError(
                f"the flow head has hidden_size {self.head.config.hidden_size} and the language model {hidden_size}; "
                "set head.hidden_size."
            )

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tokens:
        return self.tokenizer._encode(images.to(self.tokenizer.dtype), **self.settings)  # latents may be rounded

    @torch.no_grad()
    def read(self, tokens: Tokens) -> Seen:
        latents = tokens.latents[self.tokenizer.info.streams[0]]
        features = self.tokenizer._features_of(latents) if self.grown else latents
        return Seen(patches(*latents.shape[:2]), features, latents)

    def project(self, seen: Seen) -> Seen:
        return seen._replace(inputs=self.head.project(seen.inputs))

    def reconstruct(self, images: Tensor) -> Tensor:
        return self.tokenizer.reconstruct(images, **self.settings)

    def grow(self, latent: Tensor, cache: Cache | None) -> Tensor:
        """What is projected for the next latents (B, C), behind those in the cache of MingTok."""
        return latent if cache is None else self.tokenizer.step(latent, cache)

    def draws(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Times (count, N) in [0, 1] and noise (count, N, C)."""
        device, shape = generator.device, (count, self.length)
        t = torch.rand(shape, device=device, generator=generator)
        return t, torch.randn(*shape, self.head.config.latent_dim, device=device, generator=generator)

    def loss(self, hidden: Tensor, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Errors (n,) of the latents (n, C) after the hidden states (n, hidden_size), see FlowHead.loss."""
        return self.head.loss(self.head.condition(hidden), latents, t, noise)

    def writer(self, model: VisualLM, count: int, copies: int, generator: Generators, **settings) -> FlowWriter:
        return FlowWriter(self, model.lm.device, count, copies, generator, **settings)

    def save(self, folder: Path, about: dict) -> None:
        about = {"tokenizer": self.tokenizer.info.name, "num_tokens": self.num_tokens} | about
        about |= {"config": config_fields(self.head.config)}
        weights.save(folder / self.FILE, self.head.state_dict(), about)
        super().save(folder, about)

    @classmethod
    def load(cls, folder: Path) -> tuple[FlowVision, dict]:
        state, metadata = weights.read(folder / cls.FILE)
        about = weights.description(metadata, folder / cls.FILE, "tokenizer", "config", "bos")
        head = FlowHead(make_config(FlowHeadConfig(), about["config"]))
        weights.load(head, state, folder / cls.FILE)
        tokenizer = registry.load_tokenizer(about["tokenizer"], folder / TOKENIZER_FILE)
        return cls(tokenizer, head, about.get("num_tokens")), about


def widths(tokenizer: Tokenizer) -> dict[str, int]:
    """latent_dim and feature_dim of a flow head for a tokenizer. Raises ZooError where it has no latents."""
    info = tokenizer.info
    if info.kind != "continuous" or len(info.streams) > 1:
        raise ZooError(f"a flow head writes one stream of latents, and {info.name} has {info.kind} tokens.")
    latent_dim = info.latent_dims[info.streams[0]]
    grown = isinstance(tokenizer, MingTokTokenizer)
    return {"latent_dim": latent_dim, "feature_dim": tokenizer.config.semantic_width if grown else latent_dim}


def flow_head(tokenizer: Tokenizer, hidden_size: int, sizes: FlowHeadConfig | Mapping[str, int]) -> FlowHead:
    """A fresh head between a tokenizer and a language model of that width; sizes: all of them, or those fields that do
    not follow from the two."""
    if isinstance(sizes, Mapping):
        sizes = make_config(FlowHeadConfig(hidden_size=hidden_size, **widths(tokenizer)), sizes)
    return FlowHead(sizes)


class FlowWriter:
    """One latent after the other, each becoming what the model reads next."""

    def __init__(
        self,
        vision: FlowVision,
        device: torch.device,
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
        if not do_sample or top_p is not None or top_k is not None:
            raise ZooError(
                "do_sample, top_p and top_k are for the ids of a discrete tokenizer, and "
                f"{vision.tokenizer.info.name} has latents; leave them out (temperature=0 writes without noise)."
            )
        self.vision, self.copies, self.generator = vision, copies, generator
        self.scales = {"text_scale": text_scale, "image_scale": image_scale}
        self.settings = {"temperature": temperature, "num_steps": num_steps}
        self.shape, self.device = (count, vision.head.config.latent_dim), device
        self.length, self.cache = vision.length, vision.tokenizer.new_cache(count) if vision.grown else None
        self.latents, self.features = [], []

    def write(self, output: CausalLMOutputWithPast) -> Tensor:
        head = self.vision.head
        conditions = head.condition(output.hidden_states[-1][:, -1]).chunk(self.copies)
        noise = drawn(torch.randn, self.shape, self.generator, self.device)
        self.latents.append(head.sample(*conditions, **self.scales, **self.settings, noise=noise))
        self.features.append(self.vision.grow(self.latents[-1], self.cache))
        return head.project(self.features[-1]).repeat(self.copies, 1)[:, None]

    def finish(self) -> GeneratedImages:
        tokenizer, info = self.vision.tokenizer, self.vision.tokenizer.info
        grid = (info.image_size // info.size_multiple,) * 2 if info.size_multiple else None
        tokens = Tokens(latents={info.streams[0]: torch.stack(self.latents, dim=1)}, grid=grid)
        if self.vision.grown:
            return GeneratedImages(tokenizer.decode_features(torch.stack(self.features, dim=1)), tokens)
        return GeneratedImages(tokenizer.decode(tokens), tokens)

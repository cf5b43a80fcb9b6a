"""Images as latents that a flow head writes: MingTok (arXiv 2510.06590)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from zoo import registry, weights
from zoo.errors import ZooError
from zoo.lm.vision import TOKENIZER_FILE, GeneratedImages, Generators, Seen, Vision, drawn, patches
from zoo.tokenizer import Tokens, config_fields, make_config
from zoo.tokenizers.mingtok.head import FlowHead, FlowHeadConfig
from zoo.tokenizers.mingtok.tokenizer import MingTokTokenizer
from zoo.vocabulary import Stream

if TYPE_CHECKING:
    from zoo.lm.model import VisualLM

IMAGE = Stream("image", 1, "<imagePatch>", begin="<image>", end="</image>")


class FlowVision(Vision):
    """A frozen MingTok, and the head between it and the language model.

    An image in a sequence is <image>, one <imagePatch> for each latent, </image>. At a patch the model reads the
    projected feature of its latent instead of an embedded word, and what it has read before a patch, at <image> or at
    the patch before, is the condition under which the head writes that patch's latent.

    Raises ZooError when the widths of the two differ.
    """

    kind, FILE, spoken = "flow", "head.safetensors", False
    text_scale, image_scale = 3.0, 1.1  # of the published generation
    streams = (IMAGE,)

    def __init__(self, tokenizer: MingTokTokenizer, head: FlowHead):
        super().__init__(tokenizer)
        self.head = head
        for field, ours in (
            ("feature_dim", tokenizer.config.semantic_width),
            ("latent_dim", tokenizer.config.latent_dim),
        ):
            if getattr(head.config, field) != ours:
                raise ZooError(
                    f"the flow head has {field} {getattr(head.config, field)} and {tokenizer.info.name} needs {ours}; "
                    f"set head.{field}."
                )

    def check(self, hidden_size: int) -> None:
        if self.head.config.hidden_size != hidden_size:
            raise ZooError(
                f"the flow head has hidden_size {self.head.config.hidden_size} and the language model {hidden_size}; "
                "set head.hidden_size."
            )

    def inputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [0, 1] to what the model reads for them (B, N, hidden_size), and writes (B, N, C).

        Unchecked, since checks would wait for the device in each training step; see tokenizer.check_images.
        """
        with torch.no_grad():
            latents = self.tokenizer.encoder(self.tokenizer.to_values(images))[:, :-1]
            features = self.tokenizer.semantic_decoder(latents)
        return self.head.project(features), self.tokenizer.normalize(latents)

    def see(self, images: Tensor) -> Seen:
        inputs, latents = self.inputs(images)
        return Seen(patches(*inputs.shape[:2]), inputs, latents)

    def draws(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Times (count, N) in [0, 1] and noise (count, N, C)."""
        info, device = self.tokenizer.info, generator.device
        t = torch.rand(count, info.max_tokens, device=device, generator=generator)
        shape = (count, info.max_tokens, info.latent_dims["image"])
        return t, torch.randn(shape, device=device, generator=generator)

    def loss(self, hidden: Tensor, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Errors (n,) of the latents (n, C) after the hidden states (n, hidden_size), see FlowHead.loss."""
        return self.head.loss(self.head.condition(hidden), latents, t, noise)

    def writer(self, model: VisualLM, count: int, copies: int, generator: Generators, **settings) -> FlowWriter:
        return FlowWriter(self, model.lm.device, count, copies, generator, **settings)

    def save(self, folder: Path, about: dict) -> None:
        about = {"tokenizer": self.tokenizer.info.name, "config": config_fields(self.head.config)} | about
        weights.save(folder / self.FILE, self.head.state_dict(), about)
        super().save(folder, about)

    @classmethod
    def load(cls, folder: Path) -> tuple[FlowVision, dict]:
        state, metadata = weights.read(folder / cls.FILE)
        about = weights.description(metadata, folder / cls.FILE, "tokenizer", "config", "bos")
        head = FlowHead(make_config(FlowHeadConfig(), about["config"]))
        weights.load(head, state, folder / cls.FILE)
        return cls(registry.load_tokenizer(about["tokenizer"], folder / TOKENIZER_FILE), head), about


class FlowWriter:
    """One latent after the other, each becoming the feature that the model reads next."""

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
        self.length, self.cache = vision.length, vision.tokenizer.new_cache(count)
        self.latents, self.features = [], []

    def write(self, output: CausalLMOutputWithPast) -> Tensor:
        head = self.vision.head
        conditions = head.condition(output.hidden_states[-1][:, -1]).chunk(self.copies)
        noise = drawn(torch.randn, self.shape, self.generator, self.device)
        self.latents.append(head.sample(*conditions, **self.scales, **self.settings, noise=noise))
        self.features.append(self.vision.tokenizer.step(self.latents[-1], self.cache))
        return head.project(self.features[-1]).repeat(self.copies, 1)[:, None]

    def finish(self) -> GeneratedImages:
        tokenizer, side = self.vision.tokenizer, self.vision.tokenizer.config.grid
        tokens = Tokens(latents={"image": torch.stack(self.latents, dim=1)}, grid=(side, side))
        return GeneratedImages(tokenizer.decode_features(torch.stack(self.features, dim=1)), tokens)

"""Pixels of the embeddings that SEED decodes, by the frozen public diffusion models behind it, as diffusers runs them.

SEED-2 (arXiv 2310.01218) decodes to the image embedding of CLIP ViT-H/14, which stable-diffusion-2-1-unclip turns into
768 x 768 pixels; SEED-1 (arXiv 2307.08041) to the 77 text features of CLIP ViT-L/14, which Stable Diffusion 1.x takes
in place of a prompt.

What was run: the class labels against numbers of the authors' code, and both pipelines on a CPU, at tiny sizes with
random weights, against diffusers' own results. The published weights of unCLIP and Stable Diffusion were not: that
guidance 10 and 20 steps make the published pictures is taken from the authors' code, and which parts the folders of
the hub have from diffusers.

Importing this file loads neither diffusers nor transformers; making a decoder does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.hub import pinned


class PixelDecoder:
    """Base of what makes images of embeddings with a pipeline of diffusers.

    A picture is a function of its embedding, the settings and the seed, and does not depend on the batch: each image
    has a random generator of its own, on the CPU, all with the same seed, so that all start from the same latents.
    The draws are float32 in every dtype. The pipeline in float32 with a generator of that seed gives the same picture.

    It is no torch module: a tokenizer that holds one has neither its parameters nor its files.

    Args:
        pipeline: of the class that PIPELINE names.
    """

    PIPELINE: str
    """Class of diffusers."""
    UNUSED: tuple[str, ...]
    """Arguments of PIPELINE without which it decodes embeddings all the same: no files are fetched for them."""

    embed_shape: tuple[int, ...]
    """Shape of one embedding."""

    def __init__(self, pipeline):
        self.pipeline = pipeline

    @classmethod
    def load(
        cls, source: str | Path, dtype: torch.dtype | None = None, embed_shape: Sequence[int] | None = None
    ) -> PixelDecoder:
        """A published pipeline, on the CPU.

        Args:
            source: a local folder in the form of diffusers, or a hub id "owner/name", of a certain commit
                "owner/name@commit", a mirror's as well. Weights are read from safetensors files only.
            dtype: float32 without one.
            embed_shape: of the embeddings it is for, as (1024,).

        Raises:
            ZooError: the pipeline cannot be had, is of another kind, or is made for embeddings of another shape.
        """
        import diffusers
        from diffusers.utils import is_accelerate_available

        folder = Path(source).expanduser()
        if not folder.is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", str(source)):
            raise ZooError(
                f"there is no folder '{source}' with a {cls.PIPELINE}; give one in the form of diffusers, or a hub id "
                "'owner/name'."
            )
        name, revision = pinned(folder if folder.is_dir() else source)
        try:
            pipeline = getattr(diffusers, cls.PIPELINE).from_pretrained(
                name,
                **revision,
                dtype=dtype or torch.float32,
                use_safetensors=True,
                low_cpu_mem_usage=is_accelerate_available(),  # the default, without its warning
                **dict.fromkeys(cls.UNUSED),
            )
        except Exception as error:  # diffusers, transformers, the hub and the network have each their own
            if folder.is_dir():
                raise ZooError(
                    f"{source} holds no complete {cls.PIPELINE} with safetensors files ({_reason(error)}); copy its "
                    "folder again, or convert the weights where you trust them."
                ) from error
            raise ZooError(
                f"the {cls.PIPELINE} '{source}' is not complete on this machine and cannot be downloaded "
                f"({_reason(error)}); fetch its folder where there is a network and give the path, or give the id of a "
                "mirror."
            ) from error
        decoder = cls(pipeline)
        if embed_shape is not None and tuple(embed_shape) != decoder.embed_shape:
            asked = decoder._given(tuple(embed_shape))
            raise ZooError(f"{source} {decoder._takes()}, and is to decode {asked}; choose another.")
        return decoder

    @property
    def image_size(self) -> int:
        """Side in pixels of the images."""
        return self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor

    @property
    def device(self) -> torch.device:
        return self.pipeline.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.pipeline.unet.dtype

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> PixelDecoder:
        """Move the pipeline, in place."""
        self.pipeline.to(device=device, dtype=dtype)
        return self

    def check_embeddings(self, embeddings: Tensor, name: str = "embeddings") -> Tensor:
        """The embeddings in float32 on the decoder's device; ZooError when they are not what it takes."""
        want = f"{name}: the decoder {self._takes()}"
        if not isinstance(embeddings, Tensor):
            raise ZooError(f"{want}, got {type(embeddings).__name__}; make a tensor of it first.")
        if not embeddings.is_floating_point():
            raise ZooError(f"{want}, got {embeddings.dtype}; decode ids with the tokenizer first.")
        if not embeddings.ndim or embeddings.shape[1:] != self.embed_shape or not len(embeddings):
            shape = tuple(embeddings.shape)
            raise ZooError(f"{want}, got shape {shape}: {self._given(shape[1:])}.")
        if not embeddings.isfinite().all():
            raise ZooError(f"{want}, got NaN or infinite values; check what made them.")
        return embeddings.to(self.device, torch.float32)

    def _check_negative(self, negative: Tensor | None, count: int) -> Tensor | None:
        if negative is None:
            return None
        negative = self.check_embeddings(negative, "negative")
        if len(negative) not in (1, count):
            raise ZooError(f"there must be one negative, or one for each of the {count} images, got {len(negative)}.")
        return negative.expand(count, *self.embed_shape)

    def _check_settings(self, guidance: float, num_steps: int) -> None:
        if isinstance(guidance, bool) or not isinstance(guidance, int | float) or not 1 <= guidance < float("inf"):
            raise ZooError(f"guidance is a number of at least 1, which is none, got {guidance!r}.")
        most = self.pipeline.scheduler.config.num_train_timesteps
        if type(num_steps) is not int or not 1 <= num_steps <= most:
            raise ZooError(f"num_steps is a whole number from 1 to {most}, got {num_steps!r}.")

    def _takes(self) -> str:
        return f"takes float embeddings ({', '.join(map(str, ('B', *self.embed_shape)))})"

    def _given(self, embed_shape: tuple[int, ...]) -> str:
        return f"embeddings of {' x '.join(map(str, embed_shape)) or 'no'} numbers"

    def _generators(self, count: int, seed: int, generator: torch.Generator | None) -> list[torch.Generator]:
        if generator is not None:
            seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        if type(seed) is not int or not 0 <= seed < 2**63:
            raise ZooError(f"seed is a whole number from 0 to 2^63 - 1, got {seed!r}.")
        return [torch.Generator().manual_seed(seed) for _ in range(count)]

    def _normal(self, generators: list[torch.Generator], *shape: int) -> Tensor:
        """(B, *shape) float32, each image's from its own generator."""
        return torch.stack([torch.randn(shape, generator=one) for one in generators]).to(self.device)

    def _latents(self, generators: list[torch.Generator]) -> Tensor:
        side = self.pipeline.unet.config.sample_size
        return self._normal(generators, self.pipeline.unet.config.in_channels, side, side).to(self.dtype)

    def _empty_prompt(self, count: int) -> Tensor:
        """Features (B, N, D) of the prompt ""."""
        return self.pipeline.encode_prompt("", self.device, 1, False)[0].expand(count, -1, -1)

    def _run(self, guidance: float, num_steps: int, progress: bool, **conditions) -> Tensor:
        self.pipeline.set_progress_bar_config(disable=not progress)
        images = self.pipeline(
            guidance_scale=guidance,
            num_inference_steps=num_steps,
            output_type="pt",
            return_dict=False,
            **conditions,
        )[0].float()
        if images.isnan().any():  # infinite ones were clamped
            raise ZooError(f"the pipeline in {self.dtype} gave NaN for pixels; use decoder.to(dtype=torch.float32).")
        return images


class UnCLIPDecoder(PixelDecoder):
    """Images of CLIP image embeddings (B, E), by Stable unCLIP: SEED-2 with stable-diffusion-2-1-unclip, E = 1024.

    Raises ZooError for a pipeline whose UNet does not take class labels twice as wide as its embeddings.
    """

    PIPELINE = "StableUnCLIPImg2ImgPipeline"
    UNUSED = ("image_encoder", "feature_extractor")

    def __init__(self, pipeline):
        from diffusers import StableUnCLIPImg2ImgPipeline

        class FromLabels(StableUnCLIPImg2ImgPipeline):
            """Takes finished class labels as `image_embeds`: the stock one has zeros for the unconditional half, and
            asks its image encoder even where it has embeddings."""

            def _encode_image(self, image_embeds, **unused):
                return image_embeds

        config = pipeline.unet.config
        labels = config.projection_class_embeddings_input_dim if config.class_embed_type == "projection" else None
        width = pipeline.image_normalizer.config.embedding_dim
        if labels != 2 * width:
            raise ZooError(
                f"the pipeline's embeddings of {width} numbers make class labels of width {2 * width}, and its UNet "
                f"takes {labels or 'none'}; its parts are not of one unCLIP model."
            )
        super().__init__(FromLabels(**pipeline.components))
        self.embed_shape = (width,)

    @torch.no_grad()
    def decode(
        self,
        embeddings: Tensor,
        negative: Tensor | None = None,
        guidance: float = 10.0,
        num_steps: int = 20,
        noise_level: int = 0,
        seed: int = 0,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Embeddings (B, E), not normalised, to images (B, 3, image_size, image_size) float32 in [0, 1].

        The defaults are the authors'. Both halves of guidance have the prompt "".

        Args:
            negative: embeddings (B, E) or (1, E) to lead away from, with noise of level 0; without them the
                unconditional class labels are zeros. With guidance 1 they have no effect.
            guidance: g in eps = u + g (c - u), at least 1.
            num_steps: steps of the pipeline's scheduler.
            noise_level: step of the noise on the embeddings, 0 to 999. 0 is a little noise too, of standard deviation
                0.0064 where the embeddings' is 1. It is added in float32 in every dtype: in half precision, in which
                the authors decode, diffusers rounds it to none.
            seed: of the start latents and the noise, the same for every image.
            generator: draws the seed.
            progress: show a bar of the steps.

        Raises:
            ZooError: embeddings of another shape or with NaN, a setting out of its range, or pixels that are NaN.
        """
        embeddings = self.check_embeddings(embeddings)
        negative = self._check_negative(negative, len(embeddings))
        self._check_settings(guidance, num_steps)
        most = self.pipeline.image_noising_scheduler.config.num_train_timesteps - 1
        if type(noise_level) is not int or not 0 <= noise_level <= most:
            raise ZooError(f"noise_level is a whole number from 0 to {most}, got {noise_level!r}.")
        generators = self._generators(len(embeddings), seed, generator)
        # in the order in which the stock pipeline draws, and what it has not comes last
        noise = self._normal(generators, *self.embed_shape)
        latents = self._latents(generators)
        negative_noise = None if negative is None else self._normal(generators, *self.embed_shape)
        labels = class_labels(
            self.pipeline, embeddings, noise, noise_level, negative, negative_noise, guided=guidance > 1
        )
        # this pipeline, unlike that of Stable Diffusion, does not scale the latents that it is given
        self.pipeline.scheduler.set_timesteps(num_steps, device=self.device)
        prompt = self._empty_prompt(len(embeddings))
        return self._run(
            guidance,
            num_steps,
            progress,
            prompt_embeds=prompt,
            negative_prompt_embeds=prompt,
            image_embeds=labels.to(self.dtype),
            latents=latents * self.pipeline.scheduler.init_noise_sigma,
            generator=generators,
        )

    def _takes(self) -> str:
        return f"{super()._takes()} for a UNet with class labels of width {2 * self.embed_shape[0]}"

    def _given(self, embed_shape: tuple[int, ...]) -> str:
        labels = f", that make labels of width {2 * embed_shape[0]}" if len(embed_shape) == 1 else ""
        return super()._given(embed_shape) + labels


class StableDiffusionDecoder(PixelDecoder):
    """Images of text features (B, 77, 768) in place of a prompt's, by Stable Diffusion 1.x, for SEED-1.

    Its safety checker is not loaded, for it blackens pictures: whoever shows them to others has to look at them.
    Raises ZooError for a pipeline whose UNet takes class labels beside the text.
    """

    PIPELINE = "StableDiffusionPipeline"
    UNUSED = ("image_encoder", "feature_extractor", "safety_checker", "requires_safety_checker")

    def __init__(self, pipeline):
        super().__init__(pipeline)
        config = pipeline.unet.config
        if config.class_embed_type is not None:
            raise ZooError("the pipeline's UNet takes class labels, as those of unCLIP do; use a Stable Diffusion 1.x.")
        self.embed_shape = (pipeline.tokenizer.model_max_length, config.cross_attention_dim)

    @torch.no_grad()
    def decode(
        self,
        embeddings: Tensor,
        negative: Tensor | None = None,
        guidance: float = 7.5,
        num_steps: int = 50,
        seed: int = 0,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Embeddings (B, 77, 768) to images (B, 3, image_size, image_size) float32 in [0, 1].

        The defaults are those of Stable Diffusion in diffusers: SEED-1's are not in the code that its authors publish.

        Args:
            negative: embeddings (B, 77, 768) or (1, 77, 768) to lead away from; without them the features of the
                prompt "".
            guidance, num_steps, seed, generator, progress: as for UnCLIPDecoder.

        Raises:
            ZooError: embeddings of another shape or with NaN, a setting out of its range, or pixels that are NaN.
        """
        embeddings = self.check_embeddings(embeddings)
        negative = self._check_negative(negative, len(embeddings))
        self._check_settings(guidance, num_steps)
        generators = self._generators(len(embeddings), seed, generator)
        if negative is None:
            negative = self._empty_prompt(len(embeddings))
        return self._run(
            guidance,
            num_steps,
            progress,
            prompt_embeds=embeddings.to(self.dtype),
            negative_prompt_embeds=negative.to(self.dtype),
            latents=self._latents(generators),
            generator=generators,
        )


def load_decoder(
    source: str | Path, embed_shape: Sequence[int], dtype: torch.dtype | None = None
) -> UnCLIPDecoder | StableDiffusionDecoder:
    """The decoder for embeddings of a shape: (E,) by unCLIP, (N, D) by Stable Diffusion. Arguments are those of load.

    Raises ZooError for other shapes, and what `load` raises.
    """
    kinds = {1: UnCLIPDecoder, 2: StableDiffusionDecoder}
    if len(embed_shape) not in kinds:
        raise ZooError(f"pixels are made of embeddings of shape (E,) or (N, D), got {tuple(embed_shape)}.")
    return kinds[len(embed_shape)].load(source, dtype, embed_shape)


def class_labels(
    pipeline,
    embeddings: Tensor,
    noise: Tensor,
    noise_level: int = 0,
    negative: Tensor | None = None,
    negative_noise: Tensor | None = None,
    guided: bool = True,
) -> Tensor:
    """What the UNet of unCLIP is told of image embeddings (B, E): float (2B, 2E), the unconditional half first.

    A label is the embedding, with noise added at a step of the pipeline's `image_noising_scheduler` in the space of its
    `image_normalizer`, and beside it the sinusoidal embedding of the step.

    Args:
        pipeline: StableUnCLIPImg2ImgPipeline, of which these two parts are used.
        noise: (B, E) normal draws.
        noise_level: the step.
        negative: (B, E); their labels have level 0 and are the unconditional half, which is all zeros without them.
        negative_noise: (B, E) normal draws for those.
        guided: False for (B, 2E), without an unconditional half.
    """
    labels = pipeline.noise_image_embeddings(embeddings, noise_level, noise)
    if not guided:
        return labels
    if negative is None:
        return torch.cat([torch.zeros_like(labels), labels])
    return torch.cat([pipeline.noise_image_embeddings(negative, 0, negative_noise), labels])


def _reason(error: BaseException) -> str:
    """The first line of what began it: libraries wrap a missing network in sentences about their caches."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"

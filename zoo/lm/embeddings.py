"""Images as codebook embeddings behind a projector: ETT (arXiv 2505.10562)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from zoo import registry, weights
from zoo.errors import ZooError
from zoo.lm.codes import CodeWriter, encode_settings
from zoo.lm.vision import TOKENIZER_FILE, Generators, Seen, Vision, patches
from zoo.tokenizer import Tokenizer, Tokens, config_fields, make_config
from zoo.vocabulary import Stream

if TYPE_CHECKING:
    from zoo.lm.model import VisualLM


@dataclass(frozen=True)
class EmbeddingConfig:
    """How a language model reads codebook embeddings."""

    visual_head: bool = False
    """Whether images are written, too: by a head over the codes. For tokenizers of one id a position."""
    marks: bool = False
    """Whether <image> and </image> stand around an image. Without them, as published, the first word of a text is
    predicted from the last embedding of the image before it, and the first code from the last word before it."""


class EmbeddingVision(Vision):
    """A tokenizer of ids whose codebook embeddings the language model reads, through a projector (section 3.2).

    Nothing is added to the words of the model but the marks, if asked for. At each place of an image it reads
    W2 gelu(W1 e + b1) + b2 for the codebook embedding e of that place. The paper says a perceptron with GELU; its
    depth and width are the zoo's choice, and so is the head.

    Args:
        tokenizer: a discrete one.
        hidden_size: of the language model.
        config: see there.
        num_tokens: of a tokenizer of variable length: exactly so many of each image.

    Raises:
        ZooError: a tokenizer without codebook embeddings, one of variable length without num_tokens, or a head for one
            of several ids a position.
    """

    kind, FILE, spoken, unembedded, top_p = "code", "projector.safetensors", False, 1, 1.0

    def __init__(
        self,
        tokenizer: Tokenizer,
        hidden_size: int,
        config: EmbeddingConfig = EmbeddingConfig(),
        num_tokens: int | None = None,
    ):
        super().__init__(tokenizer)
        info = tokenizer.info
        if info.embedding_dim is None:
            raise ZooError(f"{info.name} has {info.kind} tokens and no codebook embeddings; give a tokenizer of ids.")
        self.settings = encode_settings(info, num_tokens)
        if info.variable_length and num_tokens is None:
            raise ZooError(f"{info.name} has tokens of variable length; say with num_tokens how many are read.")
        self.config, self.num_tokens, self.length = config, num_tokens, num_tokens or info.max_tokens
        marks = {"begin": "<image>", "end": "</image>"} if config.marks else {}
        self.streams = (Stream("image", 1, "<imageCode>", latent=True, **marks),)
        self.projector = nn.Sequential(
            nn.Linear(info.embedding_dim, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )
        self.visual_head = None
        self.obstacle = "it has no visual head, which module.embeddings.visual_head=true would give it"
        if config.visual_head:
            if len(info.streams) > 1 or info.levels:
                raise ZooError(f"a visual head writes one id a position, and {info.name} has several; leave it out.")
            self.visual_head = nn.Linear(hidden_size, info.codebook_sizes[info.streams[0]], bias=False)
            self.obstacle = ""

    def check(self, hidden_size: int) -> None:
        if self.projector[2].out_features != hidden_size:
            raise ZooError(
                f"the projector leads to hidden_size {self.projector[2].out_features} and the language model has "
                f"{hidden_size}."
            )

    @torch.no_grad()
    def read(self, tokens: Tokens) -> Seen:
        with torch.autocast(tokens.mask.device.type, enabled=False):
            codes = self.tokenizer._embed(tokens)
        ids = tokens.ids[self.tokenizer.info.streams[0]] if self.visual_head else None
        return Seen(patches(*codes.shape[:2]), codes, ids)

    def project(self, seen: Seen) -> Seen:
        return seen._replace(inputs=self.projector(seen.inputs))

    def seen(self, codes: Tensor, ids: Tensor | None = None) -> Seen:
        """What `see` gives of images, from their codebook embeddings (B, N, D), with gradient, and ids (B, N)."""
        return self.project(Seen(patches(*codes.shape[:2]), codes, ids))

    def loss(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Cross entropy (n,) of the ids (n,) after the hidden states (n, hidden_size)."""
        return F.cross_entropy(self.visual_head(hidden).float(), ids, reduction="none")

    def writer(self, model: VisualLM, count: int, copies: int, generator: Generators, **settings) -> EmbeddingWriter:
        return EmbeddingWriter(self, model, count, copies, generator, **settings)

    def save(self, folder: Path, about: dict) -> None:
        about = {"tokenizer": self.tokenizer.info.name, "num_tokens": self.num_tokens} | about
        about |= {"config": config_fields(self.config)}
        weights.save(folder / self.FILE, self.parts().state_dict(), about)
        super().save(folder, about)

    @classmethod
    def load(cls, folder: Path) -> tuple[EmbeddingVision, dict]:
        state, metadata = weights.read(folder / cls.FILE)
        about = weights.description(metadata, folder / cls.FILE, "tokenizer", "config", "num_tokens", "bos")
        tokenizer = registry.load_tokenizer(about["tokenizer"], folder / TOKENIZER_FILE)
        if "projector.2.weight" not in state:
            raise ZooError(f"{folder / cls.FILE} has no projector.2.weight; copy it again.")
        hidden_size = len(state["projector.2.weight"])
        vision = cls(tokenizer, hidden_size, make_config(EmbeddingConfig(), about["config"]), about["num_tokens"])
        weights.load(vision.parts(), state, folder / cls.FILE)
        return vision, about

    def parts(self) -> nn.ModuleDict:
        """All but the tokenizer."""
        parts = {"projector": self.projector, "visual_head": self.visual_head}
        return nn.ModuleDict({name: part for name, part in parts.items() if part is not None})


class EmbeddingWriter(CodeWriter):
    """One id after the other, its codebook embedding becoming what the model reads next."""

    def places(self) -> list[range]:
        return [range(self.vision.visual_head.out_features)] * self.vision.length

    def scores(self, output: CausalLMOutputWithPast, place: range) -> Tensor:
        return self.vision.visual_head(output.hidden_states[-1][:, -1])

    def read(self, ids: Tensor) -> Tensor:
        return self.vision.projector(self.vision.tokenizer._embed(self.tokens(ids[:, None])))[:, 0]

    def tokens(self, written: Tensor) -> Tokens:
        return Tokens({self.vision.tokenizer.info.streams[0]: written})

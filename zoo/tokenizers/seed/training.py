"""Training of SEED, as its published code means it: the causal Q-Former, then what is behind it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ZooError, nearest
from zoo.hub import pretrained
from zoo.losses.contrastive import contrastive_loss_over_ranks
from zoo.metrics.retrieval import Retrieval
from zoo.nn.precision import wide
from zoo.tokenizers.seed import published
from zoo.tokenizers.seed.tokenizer import MEAN, STD, HeadConfig, QFormerHead, SeedConfig, SeedOutput, SeedTokenizer
from zoo.tokenizers.siglip.encoder import SigLIPEncoder
from zoo.tokenizers.siglip.training import captions_of, false_captions, mirrored
from zoo.training.module import Losses, TrainingModule, batch_size
from zoo.weights import rename

WORDS_OF_A_CAPTION = 50


def clean_caption(caption: str) -> str:
    """A caption as BLIP reads it: lower case, most punctuation a blank, at most 50 words."""
    caption = re.sub(r"[.!\"()*#:;~]", " ", caption.lower())
    caption = re.sub(r"\s{2,}", " ", caption).rstrip("\n").strip(" ")
    return " ".join(caption.split(" ")[:WORDS_OF_A_CAPTION])


class SeedTraining(TrainingModule):
    """What both stages share: the image tower is frozen and always in evaluation mode.

    Args:
        tokenizer: what is trained.
        weights: of the terms of the loss; those left out are 0.
        terms: that there are.
        published_captions: captions lose punctuation and case, see clean_caption.
        others: of TrainingModule.
    """

    tokenizer: SeedTokenizer
    never_trained: Sequence[str] = ("encoder",)
    """Parts that are in evaluation mode in training, too."""

    def __init__(
        self,
        tokenizer: SeedTokenizer,
        weights: Mapping[str, float],
        terms: Sequence[str],
        published_captions: bool = False,
        **arguments,
    ):
        for name in weights:
            if name not in terms:
                raise ZooError(f"the loss has no term '{name}'{nearest(name, terms)}")
        super().__init__(tokenizer, **arguments)
        self.weights = {name: float(weight) for name, weight in weights.items() if weight}
        self.published_captions = published_captions

    def captions(self, batch: dict) -> list[str]:
        """As the text side reads them."""
        captions = captions_of(batch)
        return [clean_caption(caption) for caption in captions] if self.published_captions else captions

    def embed(self, captions: list[str]) -> Tensor:
        """Captions to embeddings (B, D), L2-normalised."""
        ids, live = self.tokenizer.text_ids(captions, truncate=True)
        return F.normalize(self.tokenizer.embed_ids(ids, live), dim=-1)

    def train(self, mode: bool = True) -> SeedTraining:
        super().train(mode)
        for name in self.never_trained:
            getattr(self.tokenizer, name).eval()
        return self

    def pictures(self, batch: dict, count: int) -> Tensor:
        """(2 count, 3, S, S): images, and what the decoder makes of their ids; without one images alone."""
        images = batch["image"][:count]
        if self.tokenizer.decoder is None:
            return images
        return torch.cat([images, self.tokenizer.reconstruct(images)])


class FeatureHead(nn.Sequential):
    """Gives back the tokens of the tower (B, M, C) from a few numbers of each query (B, N, W): what one query knows is
    not enough, so that they have to know different things."""

    def __init__(self, c: SeedConfig, numbers: int, depth: int = 2):
        tokens = HeadConfig("qformer", c.encoder.width, num_queries=c.encoder.num_tokens(c.image_size), depth=depth)
        narrow = nn.Linear(c.qformer.width, numbers), nn.Linear(numbers, c.qformer.width)
        super().__init__(*narrow, QFormerHead(tokens, c.qformer))


class SeedContrastiveTraining(SeedTraining):
    """Stage 1: the last query of an image and its caption find each other among those of all ranks.

    The loss is the weighted sum of `contrastive`, the symmetric cross entropy of cosines over a learned temperature,
    and `features`, the squared error of the tower's tokens, each normalised, as a FeatureHead gives them back. As
    published only the first is there: it trains the last query alone, and the others are BLIP-2's. Where queries begin
    from nothing they would all become alike without the second. Validation is retrieval among all its images.

    Args:
        tokenizer: with a text side.
        tower: an encoder whose image tower the frozen one is made from where nothing was loaded; it has the same sizes.
        weights: of the terms; those left out are 0.
        feature_numbers: what a FeatureHead reads of each query.
        smoothing: of the labels.
        gathers_gradient: False, as published: embeddings that are compared with are constants, see
            contrastive_loss_over_ranks.
        mirror: half of the images are mirrored where the caption names no side.
        alternatives: lists of words that exclude each other, see zoo.tokenizers.siglip.training.
        others: of SeedTraining.

    Raises:
        ZooError: no text side, an unknown term, or a tower of other sizes.
    """

    def __init__(
        self,
        tokenizer: SeedTokenizer,
        tower: SigLIPEncoder | None = None,
        weights: Mapping[str, float] = MappingProxyType({"contrastive": 1.0}),
        feature_numbers: int = 4,
        smoothing: float = 0.1,
        gathers_gradient: bool = False,
        mirror: bool = False,
        alternatives: Sequence[Sequence[str]] = (),
        **arguments,
    ):
        c = tokenizer.config
        if not c.qformer.vocab_size:
            raise ZooError(
                "the first stage needs texts; set tokenizer.qformer.vocab_size to the words of the tokenizer."
            )
        super().__init__(tokenizer, weights, ["contrastive", "features"], **arguments)
        self.smoothing, self.gathers_gradient, self.mirror = smoothing, gathers_gradient, mirror
        self.alternatives, self.retrieval = [tuple(words) for words in alternatives], Retrieval()
        self.feature_head = FeatureHead(c, feature_numbers) if "features" in self.weights else None
        if tower is not None:
            start_from_siglip(tokenizer, tower)
        tokenizer.requires_grad_(False)
        learning = ["encoder_norm", "qformer", "query_tokens"]
        if "contrastive" in self.weights:
            learning += ["image_proj", "text_proj", "temperature"]
        for name in learning:
            getattr(tokenizer, name).requires_grad_(True)
        self.train()  # Lightning leaves modes as they are

    def optimized(self) -> dict[str, nn.Module]:
        heads = [] if self.feature_head is None else [self.feature_head]
        return {"tokenizer": nn.ModuleList([self.tokenizer, *heads])}

    def losses(self, batch: dict) -> Losses:
        images, captions = batch["image"], self.captions(batch)
        draws = self.own_rows(torch.rand(len(images) * self.trainer.world_size, 4, generator=self.shared_generator()))
        if self.mirror:
            images = mirrored(images, captions, draws[:, 0])
        tower, queries = self.read(self.tokenizer.to_values(images))
        terms, logs = {}, {}
        if "contrastive" in self.weights:
            false = false_captions(captions, self.alternatives, draws[:, 1:]) if self.alternatives else []
            texts = self.embed(captions + false)
            negatives = texts[len(captions) :] if false else None
            seen = F.normalize(self.tokenizer.to_text_space(queries), dim=-1)
            terms["contrastive"] = self.contrastive(seen, texts[: len(captions)], negatives)
            logs["temperature"] = self.tokenizer.temperature.detach()
        if self.feature_head is not None:
            terms["features"] = F.mse_loss(self.feature_head(queries), F.layer_norm(tower, tower.shape[-1:]))
        loss = sum(self.weights[name] * term for name, term in terms.items())
        logs |= {name: term.detach() for name, term in terms.items()}
        yield "tokenizer", loss, logs | {"loss": loss.detach()}

    def read(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Values (B, 3, S, S) to the output of the frozen tower (B, M, C) and the queries (B, N, W)."""
        tokenizer = self.tokenizer
        with torch.no_grad():
            tower = tokenizer.encoder(values)
        return tower, tokenizer.qformer(tokenizer.query_tokens, tokenizer.encoder_norm(tower))

    def contrastive(self, images: Tensor, texts: Tensor, negatives: Tensor | None = None) -> Tensor:
        """The loss of this rank's pairs (B, D); negatives (M, D): texts that belong to no image."""
        temperature = self.tokenizer.temperature
        return contrastive_loss_over_ranks(images, texts, temperature, self.smoothing, self.gathers_gradient, negatives)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """The loss within each batch, since ranks may have unequal ones."""
        captions, (_, queries) = self.captions(batch), self.read(self.tokenizer.to_values(batch["image"]))
        images, texts = F.normalize(self.tokenizer.to_text_space(queries), dim=-1), self.embed(captions)
        self.retrieval.update(images, texts, captions)
        logits = images @ texts.T / self.tokenizer.temperature
        wanted = torch.arange(len(images), device=self.device)
        loss = (F.cross_entropy(logits, wanted) + F.cross_entropy(logits.T, wanted)) / 2
        self.log("val/loss", loss, batch_size=batch_size(batch), sync_dist=True, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        """Retrieval among the images of all batches and ranks."""
        self.log_dict({f"val/{name}": value for name, value in self.retrieval.compute().items()})
        self.retrieval.reset()


class SeedCodebookTraining(SeedTraining):
    """Stage 2: codes of the frozen queries, the queries back from the codes, and the embedding of the target.

    The loss is the weighted sum of `codebook` (of the quantizer), `queries` (1 - cosine of the queries that the codes
    give back) and `embedding` (mean squared error to the target).

    Args:
        tokenizer: whose tower, queries and Q-Former are those of stage 1.
        target: (images, captions) -> embeddings of the shape of the tokenizer's, see zoo.tokenizers.seed.targets.
        weights: of the three terms; those left out are 0.
        dropout: whether the frozen Q-Former keeps its dropout in training, as it does in the published code.
        bert: hub id or folder of a BERT from which self-attention of a head of kind "qformer" starts, as published.
        others: of SeedTraining.

    Raises:
        ZooError: an unknown term, or a target of another shape.
    """

    FROZEN = "encoder", "encoder_norm", "query_tokens", "qformer", "image_proj", "text_proj", "temperature"

    def __init__(
        self,
        tokenizer: SeedTokenizer,
        target: Callable[[Tensor, list[str] | None], Tensor],
        weights: Mapping[str, float],
        dropout: bool = True,
        bert: str | Path | None = None,
        **arguments,
    ):
        terms = ["codebook", *(["queries"] if tokenizer.config.retrieval else []), "embedding"]
        shape, wanted = tokenizer.config.head.shape, getattr(target, "shape", None)
        if wanted is not None and tuple(wanted) != shape:
            raise ZooError(
                f"the target is of shape {tuple(wanted)} and {tokenizer.info.name} makes embeddings of {shape}; set "
                "tokenizer.head, or choose another target."
            )
        super().__init__(tokenizer, weights, terms, **arguments)
        if bert is not None:
            start_from_bert(tokenizer, bert)
        self.reads_captions = bool(tokenizer.config.qformer.vocab_size and tokenizer.config.retrieval)
        self.retrieval = Retrieval()
        self.target = target
        if not dropout:
            self.never_trained = ("encoder", "encoder_norm", "qformer")
        for name in self.FROZEN:
            if hasattr(tokenizer, name):
                getattr(tokenizer, name).requires_grad_(False)
        self.train()  # Lightning leaves modes as they are

    def losses(self, batch: dict) -> Losses:
        terms, _ = self.terms(self.tokenizer.to_values(batch["image"]), self.embedded(batch))
        loss = sum(terms.values())
        logs = {name: term.detach() for name, term in terms.items()}
        yield "tokenizer", loss, logs | {"loss": loss.detach()}

    def embedded(self, batch: dict) -> Tensor:
        """What the target says of a batch."""
        captions = self.captions(batch) if getattr(self.target, "reads", "image") == "caption" else None
        return self.target(batch["image"], captions)

    def terms(self, values: Tensor, embedding: Tensor) -> tuple[dict[str, Tensor], SeedOutput]:
        """The weighted terms of the loss by name, for values (B, 3, S, S) and embeddings of the target."""
        with torch.no_grad():
            queries = self.tokenizer.query(values)
        output = self.tokenizer(queries)
        terms = {"codebook": output.quantized.loss, "embedding": F.mse_loss(output.embedding, embedding)}
        if output.reconstruction is not None:
            cosines = F.cosine_similarity(wide(output.reconstruction), wide(queries), dim=-1, eps=0.0)
            terms["queries"] = 1 - cosines.mean()
        return {name: weight * terms[name] for name, weight in self.weights.items()}, output

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """The terms without their weights, the cosine to the target and, with texts, retrieval by ids alone."""
        tokenizer, embedding = self.tokenizer, self.embedded(batch)
        output = tokenizer(tokenizer.query(tokenizer.to_values(batch["image"])))
        scores = {
            "embedding": F.mse_loss(output.embedding, embedding),
            "embedding_cosine": F.cosine_similarity(output.embedding, embedding, dim=-1).mean(),
        }
        if output.reconstruction is not None:
            scores["queries"] = 1 - F.cosine_similarity(output.reconstruction, output.queries, dim=-1).mean()
            if self.reads_captions:
                captions = self.captions(batch)
                found = F.normalize(tokenizer.to_text_space(output.reconstruction), dim=-1)
                self.retrieval.update(found, self.embed(captions), captions)
        scores["loss"] = sum(weight * scores[name] for name, weight in self.weights.items() if name in scores)
        logs = {f"val/{name}": score for name, score in scores.items()}
        self.log_dict(logs, batch_size=batch_size(batch), sync_dist=True, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        if self.reads_captions:
            self.log_dict({f"val/{name}": value for name, value in self.retrieval.compute().items()})
            self.retrieval.reset()


@torch.no_grad()
def start_from_siglip(tokenizer: SeedTokenizer, encoder: SigLIPEncoder) -> None:
    """Make the image tower that of a SigLIP encoder, which has another normalisation and no class token.

    The result is the same up to the form of GELU (SigLIP's is an approximation): keys need no bias, since what it adds
    to all scores of a row does not change them. Raises ZooError for towers of other sizes.
    """
    ours, theirs, c, s = tokenizer.encoder, encoder.vision, tokenizer.config.encoder, encoder.config
    sizes = c.patch_size, c.width, c.depth, c.num_heads, c.mlp_ratio, tokenizer.config.image_size, c.class_token
    wanted = s.patch_size, s.width, s.depth, s.num_heads, s.mlp_ratio, s.image_size, False
    if sizes != wanted:
        raise ZooError(
            f"the image tower of {tokenizer.info.name} has patch_size, width, depth, num_heads, mlp_ratio, image_size "
            f"and class_token {sizes}, and {encoder.info.name} is {wanted}; choose the encoder of its sizes, or leave "
            "tower out."
        )
    state = {}
    for name, tensor in theirs.state_dict().items():
        if name.endswith("attn.qkv.bias"):
            q, _, v = tensor.chunk(3)
            state |= {name.replace("qkv.bias", "q_bias"): q, name.replace("qkv.bias", "v_bias"): v}
        elif name in ours.state_dict() or name.endswith("attn.qkv.weight"):
            state[name] = tensor
    # SigLIP reads 2 x - 1, which is of what CLIP's normalisation gives 2 (x std + mean) - 1
    kernel = state["patch_embed.proj.weight"]
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    state["patch_embed.proj.bias"] = state["patch_embed.proj.bias"] + (kernel * (2 * mean - 1)).sum((1, 2, 3))
    state["patch_embed.proj.weight"] = kernel * 2 * std
    ours.load_state_dict(state)


@torch.no_grad()
def start_from_bert(tokenizer: SeedTokenizer, name: str | Path) -> None:
    """Self-attention and the norm of embeddings of the head's Q-Former as in a BERT of transformers; what reads images,
    and the layers of queries, BERT has not. Raises ZooError for another head, or a BERT that is not there or too small.
    """
    from transformers import BertModel

    if tokenizer.config.head.kind != "qformer":
        raise ZooError("bert= is for a head of kind 'qformer'; set tokenizer.head.kind, or leave it out.")
    state = pretrained(BertModel, name).state_dict()
    ours = rename({f"Reverse_Qformer.bert.{key}": t for key, t in state.items()}, published.names(tokenizer.config))
    head, own = "head.", tokenizer.head.state_dict()
    wanted = {key for key in own if key.startswith("qformer.norm.") or ".attn." in key}
    found = {key.removeprefix(head): t for key, t in ours.items() if key.removeprefix(head) in wanted}
    if found.keys() != wanted or any(found[key].shape != own[key].shape for key in wanted):
        raise ZooError(
            f"the BERT '{name}' is of other sizes than the head of {tokenizer.info.name}, or has fewer layers."
        )
    tokenizer.head.load_state_dict(own | found)

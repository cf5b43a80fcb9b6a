import math

import torch
from torch import Tensor
from torchmetrics import Metric

from zoo.metrics.base import Row
from zoo.tokenizer import TokenizerInfo, Tokens

LONGEST = 2**16
"""Positions per image up to which lengths are counted: 4096 x 4096 pixels at 16 x 16 each."""


def numbers(tokens: Tokens) -> Tensor:
    """(B,) int64: how many ids (of all streams and levels) or latent values the live tokens of each image hold."""
    per_position = sum(t.shape[2] if t.ndim == 3 else 1 for t in (*tokens.ids.values(), *tokens.latents.values()))
    return tokens.lengths * per_position


def image_entropies(ids: Tensor, mask: Tensor, size: int) -> Tensor:
    """(B,) float64: entropy in bits of the live ids below size, (B, N) or (B, N, levels), of each image."""
    live = ids[mask]
    image = mask.nonzero()[:, 0].view(-1, *[1] * (live.ndim - 1))
    codes, counts = (image * size + live).unique(return_counts=True)
    image, counts = codes // size, counts.double()
    zeros = counts.new_zeros(len(ids))
    share = counts / zeros.index_add(0, image, counts)[image]
    return zeros.index_add(0, image, torch.special.entr(share)) / math.log(2)


class TokenStatistics(Metric):
    """How many tokens an image takes, and how evenly each codebook is used over the data set.

    Only live tokens count. tokens_mean, tokens_p10, tokens_p90: positions per image; numbers: ids or latent values
    per image; bits: log2 of the codebook per id, latents as they are stored, and where the length varies one bit per
    position that says whether its token is live; codebook_use/STREAM: share of codes that occur at all;
    perplexity/STREAM: exp of the entropy of the distribution of codes in nats; image_entropy/STREAM: bits of the same
    entropy within an image, averaged over images. The levels of a position count alike.

    What papers on tokenizers name otherwise follows, for a codebook of K: the number of codes used is K * codebook_use,
    the KL divergence from uniform use log(K / perplexity), the entropy as a share of its greatest value
    log(perplexity) / log(K), and that within an image image_entropy / log2(K).
    """

    full_state_update = False

    def __init__(self, info: TokenizerInfo):
        super().__init__()
        self.info = info
        spread = [Row(f"tokens_p{p}", f"tokens, percentile {p}", "", ".4g") for p in (10, 90)]
        self.rows = (
            Row("tokens_mean", "tokens per image", "", ".4g"),
            *(spread if info.variable_length else ()),
            Row("numbers", "numbers per image", "", ".5g"),
            Row("bits", "bits per image", "", ".5g"),
        )
        self.add_state("lengths", torch.zeros(LONGEST + 1, dtype=torch.int64), "sum")
        self.add_state("numbers", torch.zeros((), dtype=torch.float64), "sum")
        self.add_state("bits", torch.zeros((), dtype=torch.float64), "sum")
        for name, size in info.codebook_sizes.items():
            of = f" ({name})" if len(info.codebook_sizes) > 1 else ""
            self.rows += (
                Row(f"codebook_use/{name}", f"codebook use{of}", "higher", ".1%"),
                Row(f"perplexity/{name}", f"perplexity{of} of {size} codes", "higher", ".1f"),
                Row(f"image_entropy/{name}", f"entropy within an image{of}, bits", "higher", ".2f"),
            )
            self.add_state(f"counts_{name}", torch.zeros(size, dtype=torch.int64), "sum")
            self.add_state(f"entropies_{name}", torch.zeros((), dtype=torch.float64), "sum")

    def update(self, tokens: Tokens) -> None:
        self.lengths += tokens.lengths.bincount(minlength=LONGEST + 1)
        self.numbers += numbers(tokens).sum()
        if self.info.variable_length:
            self.bits += tokens.mask.numel()
        for name, size in self.info.codebook_sizes.items():
            live = tokens.ids[name][tokens.mask]
            self.bits += live.numel() * math.log2(size)
            getattr(self, f"counts_{name}").add_(live.flatten().bincount(minlength=size))
            getattr(self, f"entropies_{name}").add_(image_entropies(tokens.ids[name], tokens.mask, size).sum())
        for name in self.info.latent_dims:
            live = tokens.latents[name][tokens.mask]
            self.bits += live.numel() * live.element_size() * 8

    def compute(self) -> dict[str, Tensor]:
        images = self.lengths.sum()
        below = self.lengths.cumsum(0)
        values = {
            "tokens_mean": (self.lengths * torch.arange(LONGEST + 1, device=below.device)).sum() / images,
            "tokens_p10": torch.searchsorted(below, (0.1 * images).ceil().long()),
            "tokens_p90": torch.searchsorted(below, (0.9 * images).ceil().long()),
            "numbers": self.numbers / images,
            "bits": self.bits / images,
        }
        for name in self.info.codebook_sizes:
            counts = getattr(self, f"counts_{name}")
            share = counts.double() / counts.sum()
            values[f"codebook_use/{name}"] = (counts > 0).double().mean()
            values[f"perplexity/{name}"] = torch.special.entr(share).sum().exp()
            values[f"image_entropy/{name}"] = getattr(self, f"entropies_{name}") / images
        return values

"""How well texts find their images, and images their texts."""

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


def recall_at(similarity: Tensor, relevant: Tensor, k: int) -> Tensor:
    """Share of the queries that have a relevant candidate among their k most similar ones.

    similarity (Q, C) float; relevant (Q, C) bool, at least one True a row. Where an irrelevant candidate is as similar
    as the best relevant one it counts as more similar, so that embeddings that are all alike find nothing.
    """
    best = similarity.where(relevant, -torch.inf).amax(1, keepdim=True)
    ahead = ((similarity >= best) & ~relevant).sum(1)
    return (ahead < k).double().mean()


def chance_at(relevant: Tensor, k: int) -> Tensor:
    """Expected recall at k of one who puts the candidates in random order; relevant as for recall_at."""
    candidates, missed = relevant.shape[1], torch.ones(len(relevant), dtype=torch.float64)
    for drawn in range(min(k, candidates)):
        missed *= ((~relevant).sum(1) - drawn).clamp(min=0) / (candidates - drawn)
    return 1 - missed.mean()


def recalls(similarity: Tensor, relevant: Tensor, ks: Sequence[int]) -> dict[str, Tensor]:
    """Recall at each k of image to text and of text to image.

    similarity (B, B') float of images and texts, relevant (B, B') bool; returns {"image_to_text_recall@1": ...}.
    """
    sides = {"image_to_text": (similarity, relevant), "text_to_image": (similarity.T, relevant.T)}
    return {f"{side}_recall@{k}": recall_at(*pair, k) for side, pair in sides.items() for k in ks}


class Retrieval(Metric):
    """Recall at k of image to text and of text to image over all pairs that were added.

    Captions that are equal belong to each other's images: either is right.
    """

    full_state_update = False

    def __init__(self, ks: Sequence[int] = (1, 5)):
        super().__init__()
        self.ks = tuple(ks)
        for name in ("images", "texts", "captions"):
            self.add_state(name, [], "cat")

    def update(self, images: Tensor, texts: Tensor, captions: Sequence[str]) -> None:
        """Add a batch: embeddings (B, D) of images and of their captions, L2-normalised, and the captions."""
        self.images.append(images)
        self.texts.append(texts)
        self.captions.append(torch.tensor([_number(caption) for caption in captions], device=images.device))

    def compute(self) -> dict[str, Tensor]:
        """{"image_to_text_recall@1": ..., "text_to_image_recall@1": ..., ...}"""
        images, texts, captions = (dim_zero_cat(state) for state in (self.images, self.texts, self.captions))
        return recalls(images @ texts.T, captions[:, None] == captions, self.ks)


def _number(text: str) -> int:
    """64 bits that stand for a text, since ranks exchange tensors only."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def recalls_at_one(images: Tensor, texts: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Recall at 1 in both directions, "image_to_text" and "text_to_image", of embeddings (B, D) of images and of their
    captions."""
    metric = Retrieval((1,))
    metric.update(images, texts, captions)
    return {name.removesuffix("_recall@1"): value.item() for name, value in metric.compute().items()}

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
        similarity, relevant = images @ texts.T, captions[:, None] == captions
        sides = {"image_to_text": similarity, "text_to_image": similarity.T}
        return {f"{side}_recall@{k}": recall_at(scores, relevant, k) for side, scores in sides.items() for k in self.ks}


def _number(text: str) -> int:
    """64 bits that stand for a text, since ranks exchange tensors only."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)

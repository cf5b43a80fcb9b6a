"""What texts alone say about images: no label was learned from."""

import torch.nn.functional as F
from torch import Tensor


def text_classifier(embeddings: Tensor) -> Tensor:
    """Embeddings (K, T, D) of T texts for each of K classes to the directions (K, D) of the classes, of length one.

    Each text is normalised, then the mean over the texts of a class (CLIP, arXiv 2103.00020, section 3.1.4). Logits of
    image embeddings (B, D) are `images @ classifier.T`; papers multiply them by 100, which changes no order.
    """
    return F.normalize(F.normalize(embeddings, dim=-1).mean(1), dim=-1)

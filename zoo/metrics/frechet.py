import functools

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3

from zoo.errors import ZooError
from zoo.metrics.base import Row, published_file
from zoo.registry import load_tokenizer
from zoo.tokenizer import Tokenizer


class Inception(nn.Module):
    """The network of FID: float images in [0, 1] to (B, 2048), resized and quantised as FID always was."""

    num_features = 2048

    def __init__(self):
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

        path = published_file(URL_INCEPTION_V3)
        self.net = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path), antialias=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.net((images * 255).round().byte().expand(-1, 3, -1, -1))


class Encoder(nn.Module):
    """A tokenizer of the zoo as extractor: images in [0, 1] to (B, D), the mean of its features over positions.

    Images are resized to the size it was made for, and turned to grey or repeated to its number of channels.
    """

    def __init__(self, name: str):
        super().__init__()
        self.tokenizer = load_tokenizer(name)
        info = self.tokenizer.info
        if info.kind == "discrete" and type(self.tokenizer)._features is Tokenizer._features:
            raise ZooError(f"{name} has ids and no features to take a Frechet distance on; name another encoder.")
        self.num_features = self(torch.zeros(1, info.channels, info.image_size, info.image_size)).shape[1]

    def forward(self, images: Tensor) -> Tensor:
        info = self.tokenizer.info
        images = interpolate(images, (info.image_size,) * 2, mode="bicubic", antialias=True).clamp(0, 1)
        if info.channels != images.shape[1]:
            images = images.mean(1, keepdim=True).expand(-1, info.channels, -1, -1)
        if type(self.tokenizer)._features is not Tokenizer._features:
            return self.tokenizer.features(images).float().mean(1)
        tokens = self.tokenizer.encode(images)
        latents = torch.cat([tokens.latents[name] for name in info.streams], dim=2).float()
        return (latents * tokens.mask[..., None]).sum(1) / tokens.lengths.clamp(min=1)[:, None]


@functools.cache
def extractor(features: str) -> nn.Module:
    """One network for all rows of a table."""
    return Inception() if features == "inception" else Encoder(features)


class FrechetDistance(FrechetInceptionDistance):
    """Frechet distance between Gaussians fitted to the features of inputs and of reconstructions.

    Args:
        features: "inception" for rFID (Heusel et al. 2017, arXiv:1706.08500), or the name of a tokenizer of the zoo.
            The number of another extractor is no FID, and its row is named after it: FD[name].

    Raises MissingWeights when those of Inception are not in the cache of torch.hub.
    """

    rows = (Row("rfid", "rFID", "lower"),)
    kinds = ("pixels",)

    def __init__(self, features: str = "inception"):
        super().__init__(feature=extractor(features))
        self.orig_dtype = torch.float64  # of the result; else it is known only on ranks that saw a batch
        if features != "inception":
            self.kinds = ("pixels", "depth")
            self.rows = (Row(f"fd[{features}]", f"FD[{features}]", "lower", ".4g"),)

    def update(self, prediction, target, keys=()):
        super().update(target, real=True)
        super().update(prediction, real=False)

    def compute(self):
        if self.real_features_num_samples < 2:
            raise ZooError("a Frechet distance needs at least 2 images; raise limit.")
        return {self.rows[0].name: super().compute()}

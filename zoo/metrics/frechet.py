import functools
import io

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3

from zoo.errors import ZooError
from zoo.metrics.base import Row
from zoo.registry import load_tokenizer
from zoo.tokenizer import Tokenizer
from zoo.weights import published_file, read

LARGEST = 4096
"""Features beyond which a covariance takes gigabytes."""


class Inception(nn.Module):
    """The network of FID: float images in [0, 1] to (B, 2048), resized and quantised as FID always was.

    output: "2048", or "logits_unbiased" (B, 1008) for the Inception Score.
    """

    num_features = 2048

    def __init__(self, output: str = "2048"):
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

        # torch-fidelity executes what is in the file that it gets, so it gets what was read without
        file = io.BytesIO()
        torch.save(read(published_file(URL_INCEPTION_V3))[0], file)
        file.seek(0)
        self.net = NoTrainInceptionV3("inception-v3-compat", [output], file, antialias=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.net((images * 255).round().byte().expand(-1, 3, -1, -1))


class Encoder(nn.Module):
    """A tokenizer of the zoo as extractor: float images in [0, 1] to (B, D).

    Its features averaged over positions; of a tokenizer without features the average of its latents, or the share of
    each of its codes. Images are resized to the size it was made for, and turned to grey or repeated to its channels.
    """

    def __init__(self, name: str):
        super().__init__()
        self.tokenizer = load_tokenizer(name)
        info = self.tokenizer.info
        self.has_features = type(self.tokenizer)._features is not Tokenizer._features
        if not self.has_features and sum(info.codebook_sizes.values()) > LARGEST:
            raise ZooError(f"{name} has too many codes to take a Frechet distance on, over {LARGEST}; name another.")
        self.num_features = self(torch.zeros(1, info.channels, info.image_size, info.image_size)).shape[1]

    def forward(self, images: Tensor) -> Tensor:
        info = self.tokenizer.info
        images = interpolate(images, (info.image_size,) * 2, mode="bicubic", antialias=True).clamp(0, 1)
        if info.channels != images.shape[1]:
            images = images.mean(1, keepdim=True).expand(-1, info.channels, -1, -1)
        if self.has_features:
            return self.tokenizer.features(images).float().mean(1)
        tokens = self.tokenizer.encode(images)
        live = tokens.mask / tokens.lengths.clamp(min=1)[:, None]  # weights of an average over live tokens
        averages = [(tokens.latents[name].float() * live[..., None]).sum(1) for name in info.latent_dims]
        for name, size in info.codebook_sizes.items():
            ids = tokens.ids[name].reshape(*live.shape, -1)
            shares = live[..., None].expand(ids.shape) / ids.shape[2]
            averages.append(shares.new_zeros(len(ids), size).scatter_add(1, ids.flatten(1), shares.flatten(1)))
        return torch.cat(averages, 1)


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

    def update(self, prediction: Tensor | None, target: Tensor | None, keys=()) -> None:
        """Images (B, C, H, W) in [0, 1] of both sides, or None for one of them."""
        for images, real in ((target, True), (prediction, False)):
            if images is not None:
                super().update(images, real=real)

    def set_real(self, mean: Tensor, covariance: Tensor, count: int) -> None:
        """Take the Gaussian (D,), (D, D) of `count` images as the real side. Raises ZooError where D is another."""
        if mean.shape != self.real_features_sum.shape or covariance.shape != self.real_features_cov_sum.shape:
            raise ZooError(
                f"the reference has a mean of shape {tuple(mean.shape)} and a covariance of {tuple(covariance.shape)}, "
                f"and the features are {tuple(self.real_features_sum.shape)}."
            )
        mean, covariance = mean.to(self.real_features_sum), covariance.to(self.real_features_cov_sum)
        self.real_features_sum = count * mean
        self.real_features_cov_sum = (count - 1) * covariance + count * mean.outer(mean)
        self.real_features_num_samples = self.real_features_num_samples + count

    def compute(self):
        if self.real_features_num_samples < 2:
            raise ZooError("a Frechet distance needs at least 2 images; raise limit.")
        return {self.rows[0].name: super().compute()}

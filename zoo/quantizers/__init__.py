"""Quantizers that systems share."""

from zoo.quantizers.ema import EMAQuantizer, Quantized, code_statistics, perplexity
from zoo.quantizers.posterior import GaussianPosterior
from zoo.quantizers.residual import ResidualQuantized, ResidualQuantizer
from zoo.quantizers.search import nearest_code, squared_distances
from zoo.quantizers.vector import VectorQuantizer, codebook_quantizer

__all__ = [
    "EMAQuantizer",
    "GaussianPosterior",
    "Quantized",
    "ResidualQuantized",
    "ResidualQuantizer",
    "VectorQuantizer",
    "code_statistics",
    "codebook_quantizer",
    "nearest_code",
    "perplexity",
    "squared_distances",
]

"""Quantizers that systems share."""

from zoo.quantizers.ema import EMAQuantizer, Quantized, code_statistics, perplexity
from zoo.quantizers.index import IndexQuantized, IndexQuantizer
from zoo.quantizers.posterior import GaussianPosterior
from zoo.quantizers.residual import ResidualQuantized, ResidualQuantizer
from zoo.quantizers.search import largest_product, nearest_code, squared_distances
from zoo.quantizers.vector import VectorQuantizer, codebook_quantizer

__all__ = [
    "EMAQuantizer",
    "GaussianPosterior",
    "IndexQuantized",
    "IndexQuantizer",
    "Quantized",
    "ResidualQuantized",
    "ResidualQuantizer",
    "VectorQuantizer",
    "code_statistics",
    "codebook_quantizer",
    "largest_product",
    "nearest_code",
    "perplexity",
    "squared_distances",
]

"""Quantizers and the search they share."""

from zoo.quantizers.ema import EMAQuantizer, Quantized, code_statistics, perplexity
from zoo.quantizers.search import nearest_code, squared_distances

__all__ = ["EMAQuantizer", "Quantized", "code_statistics", "nearest_code", "perplexity", "squared_distances"]

"""Language models that read and write images through a tokenizer of the zoo."""

from zoo.lm.codes import CodeVision
from zoo.lm.embeddings import EmbeddingConfig, EmbeddingVision
from zoo.lm.generate import generate_image, generate_text
from zoo.lm.latents import FlowVision
from zoo.lm.model import VisualLM

__all__ = [
    "CodeVision",
    "EmbeddingConfig",
    "EmbeddingVision",
    "FlowVision",
    "VisualLM",
    "generate_image",
    "generate_text",
]

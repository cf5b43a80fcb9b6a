"""Language models that read and write images through a tokenizer of the zoo."""

from zoo.lm.generate import generate_image, generate_text
from zoo.lm.model import FlowVision, VisualLM

__all__ = ["FlowVision", "VisualLM", "generate_image", "generate_text"]

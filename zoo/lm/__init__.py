"""Language models that read and write images through a tokenizer of the zoo."""

from zoo.lm.codes import CodeVision
from zoo.lm.generate import generate_image, generate_text
from zoo.lm.latents import FlowVision
from zoo.lm.model import VisualLM

__all__ = ["CodeVision", "FlowVision", "VisualLM", "generate_image", "generate_text"]

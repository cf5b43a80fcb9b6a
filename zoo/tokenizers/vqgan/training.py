"""Training of a VQGAN: pixels, codes."""

from zoo.losses import reconstruction_loss
from zoo.tokenizers.vqgan.tokenizer import VQGANTokenizer
from zoo.training.module import Losses, TrainingModule


class VQGANTraining(TrainingModule):
    def __init__(self, tokenizer: VQGANTokenizer, loss: str = "l1", **arguments):
        super().__init__(tokenizer, **arguments)
        self.loss = loss

    def losses(self, batch: dict) -> Losses:
        values = self.tokenizer.config.to_values(batch["image"])
        reconstruction, quantized = self.tokenizer(values)
        pixels = reconstruction_loss(self.loss)(reconstruction, values)
        total = pixels + quantized.loss
        logs = {
            "loss": total,
            "reconstruction": pixels,
            "quantizer": quantized.loss,
            "perplexity": quantized.perplexity,
        }
        yield "tokenizer", total, {name: value.detach() for name, value in logs.items()}

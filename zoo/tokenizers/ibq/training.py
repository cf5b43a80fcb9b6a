"""Training of IBQ (arXiv 2412.02692), as its published code does it."""

from torch import Tensor

from zoo.tokenizers.ibq.tokenizer import IBQTokenizer
from zoo.training.autoencoder import AutoencoderTraining, Regularized


class IBQTraining(AutoencoderTraining):
    """Its regularizer is the loss of the quantizer and the entropies of its choices.

    Args:
        quantizer_weight: of the former.
        entropy_weight: of the latter: clear choices for each vector, all codes over a batch.
        others: of AutoencoderTraining.
    """

    def __init__(
        self, tokenizer: IBQTokenizer, quantizer_weight: float = 1.0, entropy_weight: float = 0.05, **arguments
    ):
        super().__init__(tokenizer, **arguments)
        self.quantizer_weight, self.entropy_weight = quantizer_weight, entropy_weight

    def regularized(self, values: Tensor) -> Regularized:
        reconstruction, quantized = self.tokenizer(values)
        loss = self.quantizer_weight * quantized.loss + self.entropy_weight * quantized.entropy
        logs = {
            "quantizer": quantized.loss,
            "entropy": quantized.entropy,
            "sample_entropy": quantized.sample_entropy,
            "average_entropy": quantized.average_entropy,
        }
        return Regularized(reconstruction, loss, quantized.quantized.flatten(1, 2), logs)

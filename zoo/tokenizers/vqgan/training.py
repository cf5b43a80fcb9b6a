"""Training of a VQGAN (arXiv 2012.09841). The authors' recipe for the one in MAGE is not published; this is ours."""

from torch import Tensor

from zoo.training.autoencoder import AutoencoderTraining


class VQGANTraining(AutoencoderTraining):
    """Its regularizer is the loss of the quantizer."""

    def regularized(self, values: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        reconstruction, quantized = self.tokenizer(values)
        logs = {"quantizer": quantized.loss, "perplexity": quantized.perplexity}
        return reconstruction, quantized.loss, logs

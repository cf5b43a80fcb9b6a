"""Training of a VQGAN (arXiv 2012.09841). The authors' recipe for the one in MAGE is not published; this is ours."""

from torch import Tensor

from zoo.training.autoencoder import AutoencoderTraining, Regularized


class VQGANTraining(AutoencoderTraining):
    """Its regularizer is the loss of the quantizer."""

    def regularized(self, values: Tensor) -> Regularized:
        reconstruction, quantized = self.tokenizer(values)
        codes = quantized.quantized.flatten(1, 2)
        return Regularized(reconstruction, quantized.loss, codes, {"quantizer": quantized.loss})

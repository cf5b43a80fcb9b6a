"""Training of FSQ (arXiv 2309.15505): the loss of an autoencoder, and nothing beside it."""

from torch import Tensor

from zoo.training.autoencoder import AutoencoderTraining, Regularized


class FSQTraining(AutoencoderTraining):
    """Without a codebook there is none to be learned: the quantizer adds no loss."""

    def regularized(self, values: Tensor) -> Regularized:
        reconstruction, quantized = self.tokenizer(values)
        logs = {"perplexity": quantized.perplexity}
        return Regularized(reconstruction, quantized.loss, quantized.quantized.flatten(1, 2), logs)

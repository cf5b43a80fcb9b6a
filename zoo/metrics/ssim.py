from torchmetrics.functional.image import structural_similarity_index_measure

from zoo.metrics.base import PerImage, Row


class SSIM(PerImage):
    """Structural similarity (Wang et al. 2004) with a Gaussian window of 11 pixels, sigma 1.5, averaged over images."""

    rows = (Row("ssim", "SSIM", "higher"),)

    def scores(self, prediction, target):
        return structural_similarity_index_measure(prediction, target, data_range=1.0, reduction="none")[:, None]

from torchmetrics.functional.image import peak_signal_noise_ratio

from zoo.metrics.base import PerImage, Row


class PSNR(PerImage):
    """Peak signal-to-noise ratio in dB for values in [0, 1], of each image, then averaged.

    This is what papers on tokenizers report; the PSNR of the mean error over a data set is lower. An image without
    any error counts as 100 dB, so that it does not make the mean infinite.
    """

    rows = (Row("psnr", "PSNR, dB", "higher", ".2f"),)

    def scores(self, prediction, target):
        ratio = peak_signal_noise_ratio(prediction, target, data_range=1.0, reduction="none", dim=(1, 2, 3))
        return ratio.clamp(max=100)[:, None]

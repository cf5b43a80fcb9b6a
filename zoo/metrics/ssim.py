from torchmetrics.functional.image import structural_similarity_index_measure

from zoo.metrics.base import PerImage, Row


class SSIM(PerImage):
    """Structural similarity (Wang et al. 2004) with a Gaussian window of 11 pixels, sigma 1.5, averaged over images.

    borders: windows around every pixel count, the picture mirrored at its borders (torchmetrics). Without, those count
    that lie within the picture, as in pytorch-msssim, which DualToken reports; sides are 11 pixels at least.
    """

    rows = (Row("ssim", "SSIM", "higher"),)

    def __init__(self, borders: bool = True):
        super().__init__()
        self.borders = borders

    def scores(self, prediction, target):
        _, of_windows = structural_similarity_index_measure(prediction, target, data_range=1.0, return_full_image=True)
        if not self.borders:
            of_windows = of_windows[..., 5:-5, 5:-5]
        return of_windows.flatten(1).mean(1)[:, None]

import torchvision
from torchmetrics.image import LearnedPerceptualImagePatchSimilarity

from zoo.errors import ZooError
from zoo.metrics.base import Row
from zoo.weights import published_file, read

BACKBONES = {
    "alex": torchvision.models.AlexNet_Weights.DEFAULT,
    "vgg": torchvision.models.VGG16_Weights.DEFAULT,
    "squeeze": torchvision.models.SqueezeNet1_1_Weights.DEFAULT,
}


class LPIPS(LearnedPerceptualImagePatchSimilarity):
    """Learned perceptual distance (arXiv:1801.03924) on the features of AlexNet ("alex"), "vgg" or "squeeze".

    Raises MissingWeights when torchvision's ImageNet weights of that network are not in the cache of torch.hub.
    """

    rows = (Row("lpips", "LPIPS", "lower"),)
    kinds = ("pixels",)

    def __init__(self, net: str = "alex"):
        if net not in BACKBONES:
            raise ZooError(f"LPIPS stands on one of {', '.join(BACKBONES)}, got net={net!r}.")
        read(published_file(BACKBONES[net].url))  # which fails where torchvision would execute what is in the file
        super().__init__(net_type=net, normalize=True)
        self.rows = (Row("lpips", f"LPIPS ({net})", "lower"),)

    def update(self, prediction, target, keys=()):
        shape = (-1, 3, -1, -1)
        super().update(prediction.expand(shape), target.expand(shape))

    def compute(self):
        return {"lpips": super().compute()}

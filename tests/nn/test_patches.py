import torch

from zoo.nn.patches import patchify, unpatchify


def test_patches_are_in_raster_order_with_channels_last():
    images = torch.arange(2 * 8 * 12.0).view(1, 2, 8, 12)
    patches = patchify(images, 4)
    assert patches.shape == (1, 6, 32)
    assert torch.equal(patches[0, 4].view(4, 4, 2), images[0, :, 4:, 4:8].permute(1, 2, 0))  # row 1, column 1


def test_images_come_back_from_their_patches():
    images = torch.rand(2, 3, 8, 12)
    assert torch.equal(unpatchify(patchify(images, 4), 4, (2, 3)), images)

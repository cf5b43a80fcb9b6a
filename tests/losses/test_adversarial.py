import pytest
import torch

from zoo.errors import ZooError
from zoo.losses.adversarial import (
    LeCam,
    PatchDiscriminator,
    ResidualPatchDiscriminator,
    adaptive_weight,
    generator_loss,
    hinge_loss,
    non_saturating_loss,
)


def test_the_hinge_ends_at_one():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert hinge_loss(real, fake).item() == 0.5 * (0.25 + 0.5)
    leaky = hinge_loss(real, fake, slope=0.25)  # (-0.25 + 0.5) / 2 and (-0.5 + 1) / 2
    assert leaky.item() == 0.5 * (0.125 + 0.25)


def test_the_adaptive_weight_is_the_ratio_of_gradients_within_bounds():
    layer = torch.ones(4, requires_grad=True)  # gradients of c * sum have the length 2 c
    weight = adaptive_weight(3 * layer.sum(), 0.5 * layer.sum(), layer)
    torch.testing.assert_close(weight, torch.tensor(6 / (1 + 1e-4)))
    assert not weight.requires_grad
    torch.testing.assert_close(adaptive_weight(layer.sum(), 0 * layer.sum(), layer), torch.tensor(1e4))
    assert adaptive_weight(0 * layer.sum(), layer.sum(), layer) == 0
    assert adaptive_weight(layer.sum(), 0 * layer.sum(), layer, low=0.3, high=10) == 10
    torch.testing.assert_close(
        adaptive_weight(0 * layer.sum(), layer.sum(), layer, low=0.3, high=10), torch.tensor(0.3)
    )


def test_a_factor_of_zero_leaves_pixels_and_lpips():
    torch.manual_seed(0)
    images, values = torch.rand(2, 2, 3, 32, 32).unbind()
    layer = torch.ones((), requires_grad=True)
    logits = PatchDiscriminator(width=4)(values * layer)
    pixels = (images - values * layer).abs().mean()
    loss, logs = generator_loss(pixels, torch.full((2, 1, 1, 1), 0.5), logits, layer, 0.2, 0.0)
    torch.testing.assert_close(loss.detach(), (images - values).abs().mean() + 0.5)
    assert logs["adversarial_weight"] > 0


def test_a_patch_discriminator_has_one_logit_for_each_patch():
    assert PatchDiscriminator()(torch.rand(1, 3, 256, 256)).shape == (1, 1, 30, 30)


@pytest.mark.parametrize(("size", "grid"), [((64, 64), (8, 8)), ((37, 64), (5, 8)), ((41, 23), (6, 3))])
def test_a_residual_discriminator_has_a_logit_for_every_eight_pixels(size, grid):
    assert ResidualPatchDiscriminator(width=32)(torch.rand(2, 3, *size)).shape == (2, 1, *grid)


def test_a_residual_discriminator_is_moved_everywhere_and_moves_every_pixel():
    torch.manual_seed(0)
    discriminator, images = ResidualPatchDiscriminator(in_channels=1, width=32), torch.rand(1, 1, 19, 16)
    discriminator(images.requires_grad_()).square().mean().backward()
    assert images.grad.ne(0).all()
    assert all(p.grad.ne(0).any() for p in discriminator.parameters())


def test_a_residual_discriminator_has_the_published_number_of_parameters():
    assert sum(p.numel() for p in ResidualPatchDiscriminator().parameters()) == 1_729_409
    with pytest.raises(ZooError, match="multiple of 32, got 48"):
        ResidualPatchDiscriminator(width=48)


def test_widths_of_a_residual_discriminator_end_at_eight_times_the_first():
    discriminator = ResidualPatchDiscriminator(width=32, num_layers=4)
    assert discriminator(torch.rand(1, 3, 64, 64)).shape == (1, 1, 4, 4)
    assert not hasattr(discriminator.main[5], "nin_shortcut")


def test_the_non_saturating_loss_is_of_mean_logits():
    logits = torch.tensor([[1.0, 3.0], [-1.0, -3.0]]).view(2, 1, 1, 2)
    expected = (torch.tensor([-2.0, 2.0]).exp() + 1).log().mean()
    torch.testing.assert_close(non_saturating_loss(logits), expected)


def test_a_constant_weight_needs_no_gradients_of_the_last_layer():
    pixels, logits = torch.tensor(0.5, requires_grad=True), torch.zeros(2, 1, 3, 3)
    loss, logs = generator_loss(pixels, None, logits, None, 0.1, 1.0, "non_saturating", adaptive=False)
    torch.testing.assert_close(loss.detach(), 0.5 + 0.1 * torch.tensor(2.0).log())
    assert logs["adversarial_weight"] == pytest.approx(0.1)


def test_lecam_moves_its_means_first_and_only_in_training():
    lecam, real, fake = LeCam(decay=0.5), torch.tensor([1.0, 3.0]), torch.tensor([-1.0, -1.0])
    loss = lecam(real, fake)  # means become 1 and -0.5
    assert (lecam.real, lecam.fake) == (1, -0.5)
    assert loss == (1.5**2 + 3.5**2) / 2 + 2**2
    assert lecam.eval()(fake, real) == 0
    assert lecam.real == 1

import torch

from zoo.losses.adversarial import PatchDiscriminator, adaptive_weight, generator_loss, hinge_loss


def test_the_hinge_ends_at_one():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert hinge_loss(real, fake).item() == 0.5 * (0.25 + 0.5)


def test_the_adaptive_weight_is_the_ratio_of_gradients_within_bounds():
    layer = torch.ones(4, requires_grad=True)  # gradients of c * sum have the length 2 c
    weight = adaptive_weight(3 * layer.sum(), 0.5 * layer.sum(), layer)
    torch.testing.assert_close(weight, torch.tensor(6 / (1 + 1e-4)))
    assert not weight.requires_grad
    torch.testing.assert_close(adaptive_weight(layer.sum(), 0 * layer.sum(), layer), torch.tensor(1e4))
    assert adaptive_weight(0 * layer.sum(), layer.sum(), layer) == 0


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

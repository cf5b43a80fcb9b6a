import pytest
import torch
import torch.nn.functional as F

from zoo.quantizers import VectorQuantizer


@pytest.fixture(params=[False, True], ids=["plain", "normalised"])
def quantizer(request):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(8, 4, commitment=0.25, codebook_weight=2.0, normalize=request.param)
    torch.nn.init.normal_(quantizer.codebook)
    return quantizer


def scaled(quantizer, x):
    return F.normalize(x, dim=-1) if quantizer.normalize else x


def test_vectors_become_their_nearest_codes_with_the_gradient_of_the_vectors(quantizer):
    z = torch.randn(2, 5, 4, requires_grad=True)
    out = quantizer(z)
    codes = scaled(quantizer, quantizer.codebook)
    assert torch.equal(out.ids, torch.cdist(scaled(quantizer, z), codes).argmin(-1))
    torch.testing.assert_close(out.quantized, codes[out.ids])
    direction = torch.randn(2, 5, 4)
    (grad,) = torch.autograd.grad((out.quantized * direction).sum(), z)
    (expected,) = torch.autograd.grad((scaled(quantizer, z) * direction).sum(), z)
    torch.testing.assert_close(grad, expected)


def test_the_loss_pulls_vectors_and_codes_to_each_other(quantizer):
    z = torch.randn(6, 4, requires_grad=True)
    out = quantizer(z)
    codes = scaled(quantizer, quantizer.codebook)[out.ids]
    commitment = 0.25 * (scaled(quantizer, z) - codes.detach()).square().mean()
    codebook = 2 * (codes - scaled(quantizer, z).detach()).square().mean()
    torch.testing.assert_close(out.loss, commitment + codebook)
    of_z, of_codebook = torch.autograd.grad(out.loss, [z, quantizer.codebook])
    torch.testing.assert_close(of_z, torch.autograd.grad(commitment, z)[0])
    torch.testing.assert_close(of_codebook, torch.autograd.grad(codebook, quantizer.codebook)[0])


def test_equal_codes_give_the_lowest_id(quantizer):
    with torch.no_grad():
        quantizer.codebook[5] = quantizer.codebook[2]
    assert quantizer.encode(quantizer.codebook[[5]]).tolist() == [2]


def test_ids_do_not_depend_on_autocast(quantizer):
    z = torch.randn(64, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = quantizer(z)
    assert torch.equal(out.ids, quantizer.encode(z))
    assert out.quantized.dtype == torch.float32


def test_perplexity_is_that_of_the_codes_used(quantizer):
    assert quantizer(quantizer.codebook).perplexity.item() == pytest.approx(8, abs=1e-3)

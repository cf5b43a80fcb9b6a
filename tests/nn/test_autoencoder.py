"""The convolutional family, where the reference vectors do not look."""

import pytest
import torch

import zoo
from zoo import ZooError
from zoo.nn.autoencoder import AutoencoderConfig, to_map, to_tokens
from zoo.quantizers import GaussianPosterior

SMALL = {"image_size": 32, "channels": 8, "multipliers": (1, 2, 2), "num_blocks": 1, "norm_groups": 4}


@pytest.fixture(params=["vqgan-f16", "kl-f16"])
def tokenizer(request):
    torch.manual_seed(0)
    extra = {"embed_dim": 8} | ({"attention": (8,)} if request.param == "kl-f16" else {"codebook_size": 16})
    return zoo.create_tokenizer(request.param, **SMALL, **extra).eval()


def test_a_batch_equals_its_images_one_by_one(tokenizer):
    images = torch.rand(3, 3, 32, 48)
    tokens = tokenizer.encode(images)
    assert tokens.grid == (8, 12)
    decoded = tokenizer.decode(tokens)
    for i in range(3):
        alone = tokenizer.encode(images[i : i + 1])
        if tokens.ids:
            assert torch.equal(alone.ids["image"], tokens[i].ids["image"])
        else:
            torch.testing.assert_close(alone.latents["image"], tokens[i].latents["image"])
        torch.testing.assert_close(tokenizer.decode(alone), decoded[i : i + 1])


def test_images_that_the_grid_does_not_divide_are_refused(tokenizer):
    with pytest.raises(ZooError, match="multiples of 4, got 32 x 30"):
        tokenizer.encode(torch.rand(1, 3, 32, 30))


def test_latents_of_a_kl_autoencoder_are_scaled_means_or_samples():
    torch.manual_seed(0)
    tokenizer = zoo.create_tokenizer("kl-f16", **SMALL, embed_dim=8, attention=()).eval()
    images = torch.rand(2, 3, 32, 32)
    posterior = tokenizer.posterior(2 * images - 1)
    mean = tokenizer.encode(images).latents["image"]
    torch.testing.assert_close(mean, to_tokens(0.2325 * posterior.mean))
    torch.manual_seed(1)
    sample = tokenizer.encode(images, sample_posterior=True).latents["image"]
    torch.manual_seed(1)
    noise = torch.randn_like(posterior.mean)
    torch.testing.assert_close(sample, to_tokens(0.2325 * (posterior.mean + (posterior.logvar / 2).exp() * noise)))
    decoded = tokenizer.decode_latents(posterior.mean)
    torch.testing.assert_close(tokenizer.reconstruct(images), (decoded / 2 + 0.5).clamp(0, 1))


def test_log_variances_of_a_posterior_stay_within_their_bounds():
    posterior = GaussianPosterior.from_moments(torch.tensor([[0.0, 0.0, -100.0, 100.0]])[..., None])
    assert posterior.logvar.flatten().tolist() == [-30, 20]
    standard = GaussianPosterior(torch.zeros(2, 3), torch.zeros(2, 3))
    assert standard.kl().tolist() == [0, 0]


def test_a_map_becomes_tokens_and_a_map_again():
    features = torch.rand(2, 5, 3, 4)
    assert torch.equal(to_map(to_tokens(features), (3, 4)), features)
    with pytest.raises(ZooError, match="12 tokens are no square map"):
        to_map(to_tokens(features), None)


def test_every_parameter_has_a_gradient(tokenizer):
    output, regularizer = tokenizer(torch.rand(2, 3, 32, 32))
    loss = regularizer.kl().mean() if isinstance(regularizer, GaussianPosterior) else regularizer.loss
    (output.square().mean() + loss).backward()
    assert [name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"style": "jax"}, "style must be 'ldm' or 'mage', got 'jax'"),
        ({"channels": 40}, "channels 40 is no multiple of norm_groups 32"),
        ({"image_size": 250}, "image_size 250 is no multiple of 16"),
        ({"multipliers": ()}, "at least 1 per level"),
        ({"style": "mage"}, "no attention"),
        ({"num_blocks": 0}, "num_blocks must be at least 1"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes, complaint):
    with pytest.raises(ZooError, match=complaint):
        AutoencoderConfig(**changes)

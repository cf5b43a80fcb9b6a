"""The trained seed-tiny, and its decoder."""

import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo import registry
from zoo.data import Loader, scenes
from zoo.metrics.retrieval import recalls_at_one
from zoo.metrics.tokens import TokenStatistics


@pytest.fixture(scope="module")
def tokenizer():
    return zoo.load_tokenizer("seed-tiny")


@pytest.fixture(scope="module")
def batch():
    return next(iter(Loader(scenes("val"), batch_size=128, fields=["image", "caption"])))


def test_files_are_small():
    for kind, name in ((registry.tokenizers, "seed-tiny"), (registry.decoders, "seed-tiny-decoder")):
        assert kind.weights_path(name).stat().st_size <= 16e6


def test_texts_are_found_by_embeddings_and_by_ids_alone(tokenizer, batch):
    texts = tokenizer.encode_text(batch["caption"])
    before = recalls_at_one(tokenizer.encode_image(batch["image"], quantized=False), texts, batch["caption"])
    ids = recalls_at_one(tokenizer.encode_image(batch["image"]), texts, batch["caption"])
    for side in ("image_to_text", "text_to_image"):
        assert before[side] > 0.85
        assert ids[side] > 0.75


def test_ids_of_an_image_say_different_things(tokenizer, batch):
    statistics = TokenStatistics(tokenizer.info)
    statistics.update(tokenizer.encode(batch["image"]))
    found = statistics.compute()
    assert found["image_entropy/image"] > 1.5
    assert found["perplexity/image"] > 150


def test_half_precision_gives_the_same_ids(tokenizer, batch):
    ids = tokenizer.encode(batch["image"]).ids["image"]
    for dtype in (torch.float16, torch.bfloat16):
        half = zoo.load_tokenizer("seed-tiny", dtype=dtype)
        assert (half.encode(batch["image"]).ids["image"] == ids).double().mean() >= 0.99


def test_more_ids_tell_more(tokenizer, batch):
    """Codes that are not known are the mean of their place over other scenes."""
    others = next(iter(Loader(scenes("train"), batch_size=256, fields=["image"])))["image"]
    quantizer, encoder = tokenizer.quantizer, zoo.load_encoder("siglip-tiny")
    codes = quantizer.codes(tokenizer.encode(batch["image"]).ids["image"])
    mean = quantizer.codes(tokenizer.encode(others).ids["image"]).mean(0)
    with torch.no_grad():
        wanted, errors = encoder.vision(2 * batch["image"] - 1), []
        for k in (0, 2, 8, 32):
            known = codes.where((torch.arange(32) < k)[:, None], mean)
            errors.append(F.mse_loss(tokenizer.to_embedding(tokenizer.decoded(known)), wanted).item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.2 * errors[0]


def test_pictures_mean_what_the_image_means(tokenizer, batch):
    images, encoder = batch["image"][:16], zoo.load_encoder("siglip-tiny")
    tokens = tokenizer.encode(images)
    pictures = tokenizer.decode(tokens, num_steps=10)
    assert pictures.shape == images.shape
    similarity = encoder.encode_image(pictures) @ encoder.encode_image(images).T
    assert (similarity.argmax(1) == torch.arange(16)).double().mean() > 0.7
    assert torch.equal(tokenizer.decode(tokens[:2], num_steps=10), tokenizer.decode(tokens[:2], num_steps=10))

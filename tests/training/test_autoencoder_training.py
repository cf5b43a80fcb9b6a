"""The recipe that convolutional autoencoders share."""

from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch

import zoo
from zoo.tokenizers.kl.training import KLTraining
from zoo.tokenizers.vqgan.training import VQGANTraining

ROOT = Path(__file__).parents[2]
SIZES = {"image_size": 32, "channels": 8, "multipliers": (1, 2, 2), "num_blocks": 1, "norm_groups": 4, "embed_dim": 8}
adamw = partial(torch.optim.AdamW, lr=1e-3, fused=True)
TRAININGS = {"vqgan-f16": (VQGANTraining, {"codebook_size": 16}), "kl-f16": (KLTraining, {"attention": (8,)})}


def make(name, **options):
    torch.manual_seed(0)
    training, sizes = TRAININGS[name]
    optimizers = {"tokenizer": adamw} | ({"discriminator": adamw} if options.get("adversarial_weight") else {})
    return training(zoo.create_tokenizer(name, **SIZES, **sizes), optimizers=optimizers, **options)


def fit(module, steps, *callbacks):
    images = torch.rand(8, 3, 1, 1, generator=torch.Generator().manual_seed(1)).expand(-1, -1, 32, 32)
    data = torch.utils.data.DataLoader([{"image": image} for image in images], batch_size=4)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(module, data)
    return trainer.callback_metrics


@pytest.mark.parametrize("name", TRAININGS)
def test_the_loss_falls(name):
    first, last = (fit(make(name), steps)["train/pixels"].item() for steps in (1, 40))
    assert last < 0.8 * first


@pytest.mark.parametrize("name", TRAININGS)
def test_the_discriminator_counts_from_its_step_on(name, watch):
    module = make(name, adversarial_weight=0.5, adversarial_start=2, discriminator_width=8)
    metrics = fit(module, 4, watch)
    assert watch.moved == [{"tokenizer"}] * 2 + [{"tokenizer", "discriminator"}] * 2
    assert metrics["train/adversarial_weight"] > 0


def test_two_ranks_train_a_vqgan_with_its_discriminator(tmp_path, train_on):
    sizes = ("tokenizer.channels=8", "tokenizer.norm_groups=4", "module.discriminator_width=8")
    discriminator = ("module.adversarial_weight=0.1", "+module.optimizers.discriminator=${optimizer}")
    metrics = train_on(2, tmp_path, "vqgan-tiny", *sizes, *discriminator)
    assert len(metrics["train/loss"]) == 4

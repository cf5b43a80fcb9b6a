"""trainer=fsdp on two CPU ranks."""

import csv

import pytest
import torch
from torch import nn

import zoo
from zoo.training.sharding import blocks

SHARDED = "trainer.strategy={_target_:zoo.training.sharding.ShardedStrategy,find_unused_parameters:true}"
SMALL = ["tokenizer.channels=8", "tokenizer.norm_groups=4", "data.num_workers=0"]
DISCRIMINATOR = [
    *("module.adversarial_weight=0.1", "module.discriminator_width=8"),
    "+module.optimizers.discriminator=${optimizer}",
]
SGD = ["optimizer._target_=torch.optim.SGD", "~optimizer.betas", "optimizer.fused=false", "optimizer.lr=1e-3"]


def load(folder):
    return zoo.load_tokenizer("kl-tiny", weights=folder / "tokenizer.safetensors").state_dict()


def logged(folder, name):
    with (folder / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, train_on):
    """Four batches with a discriminator and an average of weights: on one rank, divided among two, and two batches on
    two ranks that one rank goes on from."""
    folder = tmp_path_factory.mktemp("sharding")
    options = [*SMALL, *DISCRIMINATOR, *SGD, "schedule.warmup_steps=0"]
    train_on(1, folder / "one", "kl-tiny", *options)
    train_on(2, folder / "two", "kl-tiny", *options, SHARDED)
    train_on(2, folder / "half", "kl-tiny", *options, SHARDED, "trainer.max_steps=2")
    train_on(1, folder / "half", "kl-tiny", *options, "resume=true")
    return folder


def test_divided_weights_train_as_whole_ones(folder):
    for name in ("tokenizer", "discriminator"):
        one, two = (logged(folder / run, f"train/gradient_norm/{name}") for run in ("one", "two"))
        assert len(one) == 4
        assert two[0] == pytest.approx(one[0], rel=1e-5)
        assert two == pytest.approx(
            one, rel=1e-2
        )  # the adaptive weight, a ratio of small gradients, multiplies rounding
    expected = load(folder / "one")
    for name, tensor in load(folder / "two").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_a_checkpoint_of_divided_weights_goes_on_on_one_rank(folder):
    expected = load(folder / "one")
    for name, tensor in load(folder / "half").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_blocks_are_what_stands_in_lists_and_shares_no_weights():
    class Outer(nn.Module):
        """Runs its parts itself, and owns one weight."""

        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
            self.scale = nn.Parameter(torch.ones(2))

        def forward(self, x):
            return self.inner[1](self.inner[0](x)) * self.scale

    layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.GELU()), Outer(), nn.Embedding(3, 2), nn.GELU()])
    module = nn.ModuleDict({"layers": layers, "head": nn.Linear(2, 2), "tied": nn.ModuleList([nn.Linear(2, 2)])})
    module["tied"][0].weight = module["head"].weight
    assert list(blocks(module)) == [layers[0], *layers[1].inner]

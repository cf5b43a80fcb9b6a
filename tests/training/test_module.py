"""The shared loop, on the smallest tokenizer there can be and data that are a function of their index."""

from functools import partial

import lightning as L
import pytest
import torch
from torch import nn

from zoo.errors import ZooError
from zoo.tokenizer import Tokenizer, TokenizerInfo
from zoo.training import schedules
from zoo.training.callbacks import EpochWeightAveraging
from zoo.training.module import TrainingModule, parameter_groups


class Scalar(Tokenizer):
    """weight * image."""

    def __init__(self):
        super().__init__(None)
        self.weight = nn.Parameter(torch.ones(1, 1))
        self.info = TokenizerInfo("test", "", 2, None, 1, "discrete", ("image",), 1)

    def forward(self, images):
        return self.weight * images

    def reconstruct(self, images):
        return self(images).detach()


class Data(torch.utils.data.Dataset):
    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return {"image": torch.full((1, 2, 2), float(self.values[index])), "key": f"sample-{index}"}


class Regression(TrainingModule):
    def losses(self, batch):
        loss = (self.tokenizer(batch["image"]) - 2).square().mean()
        yield "tokenizer", loss, {"loss": loss.detach()}


def loader(values, batch_size=1):
    return torch.utils.data.DataLoader(Data(values), batch_size)


def fit(module, data, max_steps, **trainer):
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **trainer,
    )
    trainer.fit(module, data)
    return trainer


sgd = partial(torch.optim.SGD, lr=0.1, fused=True)


def test_accumulated_batches_step_as_one_large_batch():
    one, four = (Regression(Scalar(), {"tokenizer": sgd}, accumulate=n) for n in (1, 4))
    fit(one, loader([0.1, 0.5, 0.9, 0.3], 4), max_steps=1)
    trainer = fit(four, loader([0.1, 0.5, 0.9, 0.3], 1), max_steps=1)
    assert trainer.global_step == 1
    torch.testing.assert_close(one.tokenizer.weight, four.tokenizer.weight)


def test_a_long_gradient_is_clipped_to_its_norm():
    module = Regression(Scalar(), {"tokenizer": sgd}, gradient_clip=0.5)
    fit(module, loader([1.0]), max_steps=1)
    torch.testing.assert_close(module.tokenizer.weight.item(), 1 + 0.1 * 0.5)


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_without_finite_gradient_is_skipped_and_named(fused, capsys):
    adam = partial(torch.optim.AdamW, lr=0.1, fused=fused)
    bad, good = (Regression(Scalar(), {"tokenizer": adam}) for _ in range(2))
    fit(bad, loader([0.5, float("nan"), 0.5]), max_steps=3)
    fit(good, loader([0.5, 0.5]), max_steps=2)
    torch.testing.assert_close(bad.tokenizer.weight, good.tokenizer.weight)
    assert "step 2 was skipped" in (out := capsys.readouterr().out)
    assert "sample-1" in out


def test_too_many_bad_steps_in_a_row_end_the_run_with_the_name_of_the_batch():
    module = Regression(Scalar(), {"tokenizer": sgd}, max_bad_steps=2)
    with pytest.raises(ZooError, match=r"3 steps in a row.*sample-3"):
        fit(module, loader([0.5, *[float("inf")] * 5]), max_steps=6)


class Adversarial(TrainingModule):
    """The second loss sees the weights that the first one's step left."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.critic = nn.Linear(1, 1, bias=False)
        self.seen = []

    def optimized(self):
        return {"tokenizer": self.tokenizer, "critic": self.critic}

    def losses(self, batch):
        fake = self.tokenizer(batch["image"]).mean().view(1, 1)
        yield "critic", self.critic(fake.detach()).sum(), {}
        self.seen.append(self.critic.weight.item())
        yield "tokenizer", self.critic(fake).sum(), {}


def test_losses_step_in_their_order_and_reach_their_own_parameters_only():
    module = Adversarial(tokenizer=Scalar(), optimizers={"critic": sgd, "tokenizer": sgd})
    with torch.no_grad():
        module.critic.weight.fill_(1.0)
    trainer = fit(module, loader([0.5]), max_steps=1)
    assert trainer.global_step == 1  # one step of the run, though two optimizers stepped
    updated = 1 - 0.1 * 0.5
    assert module.seen == [pytest.approx(updated)]
    assert module.critic.weight.item() == pytest.approx(updated)  # the second loss left the critic alone
    assert module.tokenizer.weight.item() == pytest.approx(1 - 0.1 * 0.5 * updated)


def test_missing_optimizers_are_named():
    with pytest.raises(ZooError, match="critic"):
        fit(Adversarial(tokenizer=Scalar(), optimizers={"tokenizer": sgd}), loader([0.5]), max_steps=1)


class Alternating(Adversarial):
    """Odd batches are the critic's."""

    def losses(self, batch):
        name = ("tokenizer", "critic")[self.trainer.fit_loop.epoch_loop.batch_idx % 2]
        yield name, self.critic(self.tokenizer(batch["image"]).mean().view(1, 1)).sum(), {}


def test_schedules_and_steps_of_the_run_follow_the_batches_whoever_steps():
    schedule = partial(schedules.cosine, warmup_steps=4)
    module = Alternating(
        tokenizer=Scalar(),
        optimizers={"tokenizer": sgd, "critic": sgd},
        schedules={"tokenizer": schedule, "critic": schedule},
    )
    trainer = fit(module, loader([0.5] * 3), max_steps=3)
    assert trainer.global_step == 3
    assert [o.param_groups[0]["lr"] for o in trainer.optimizers] == [pytest.approx(0.1 * 3 / 4)] * 2


class Shared(Regression):
    def losses(self, batch):
        rows = torch.rand(2, 3, generator=self.shared_generator())
        assert torch.equal(self.own_rows(rows), rows)  # one rank has them all
        self.draws = [*getattr(self, "draws", []), rows[0, 0].item()]
        yield from super().losses(batch)


def test_what_ranks_draw_alike_depends_on_seed_and_step_alone():
    runs = []
    for seed in (3, 3, 4):
        module = Shared(Scalar(), {"tokenizer": sgd}, seed=seed)
        fit(module, loader([0.5, 0.1]), max_steps=2)
        runs.append(module.draws)
    assert runs[0] == runs[1]
    assert len({*runs[0], *runs[2]}) == 4


def test_an_average_of_an_epoch_starts_from_its_first_weights():
    average = EpochWeightAveraging(decay=0.5)
    module = Regression(Scalar(), {"tokenizer": sgd})
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append((module.tokenizer.weight.item(), average._average_model.module.tokenizer.weight.item()))

    fit(module, loader([1.0, 1.0]), max_steps=4, callbacks=[Watch(), average])
    weights, averages = zip(*seen, strict=True)  # the average is updated after the other callbacks
    start = weights[1]
    assert averages[2] == pytest.approx(start)  # of the second epoch nothing was averaged yet
    assert averages[3] == pytest.approx((start + weights[2]) / 2)


class Noisy(Regression):
    def losses(self, batch):
        self.draws = [*getattr(self, "draws", []), torch.rand(()).item()]
        yield from super().losses(batch)


def test_random_numbers_of_a_step_depend_on_seed_and_step_alone():
    runs = []
    for before in (1, 2):
        module = Noisy(Scalar(), {"tokenizer": sgd}, seed=7)
        torch.manual_seed(before)
        fit(module, loader([0.5, 0.1, 0.2]), max_steps=3)
        runs.append(module.draws)
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 3


def test_the_schedule_of_the_config_moves_the_rate():
    module = Regression(
        Scalar(), {"tokenizer": sgd}, schedules={"tokenizer": partial(schedules.cosine, warmup_steps=2)}
    )
    trainer = fit(module, loader([0.0] * 4), max_steps=4)  # a gradient of zero: only the rate moves
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0)


def test_vectors_and_biases_do_not_decay():
    groups = parameter_groups(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    assert [len(group["params"]) for group in groups] == [1, 3]
    assert groups[1]["weight_decay"] == 0


def test_schedules_follow_their_formulas():
    assert schedules.cosine(5, 100, 10, warmup_steps=10) == 0.5
    assert schedules.cosine(55, 100, 10, warmup_steps=10, min_ratio=0.1) == pytest.approx(0.55)
    assert schedules.cosine(100, 100, 10, warmup_steps=10, min_ratio=0.1) == pytest.approx(0.1)
    assert schedules.cosine(30, 1000, 10, warmup_epochs=6) == 0.5
    with pytest.raises(ZooError, match="max_steps"):
        schedules.cosine(0, -1, -1)
    with pytest.raises(ZooError, match=r"set schedule.warmup_steps"):
        schedules.cosine(0, 100, -1, warmup_epochs=1)
    first = [schedules.cosine(step, 20, 10, warmup_steps=4, warmup_offset=1) for step in range(5)]
    assert first == [0.25, 0.5, 0.75, 1, 1]
    assert schedules.constant(3, -1, -1, warmup_steps=6) == 0.5
    # 1,200 iterations an epoch: decays after iterations 0, 500 and 1000 of each
    steps = {0: 0, 1: 1, 500: 1, 501: 2, 1001: 3, 1200: 3, 1201: 4, 2400: 6}
    for step, decays in steps.items():
        assert schedules.stepped_in_epoch(step, -1, 1200) == pytest.approx(0.98**decays)


def test_floors_annealing_and_milestones_follow_their_formulas():
    floored = partial(schedules.floored_cosine, total=110, epoch=-1, warmup_steps=10, min_ratio=0.4)
    assert [floored(step) for step in (5, 10, 60, 90, 110, 200)] == pytest.approx([0.5, 1, 0.5, 0.4, 0.4, 0.4])
    annealed = partial(schedules.annealed, total=111, epoch=-1, warmup_steps=10, first_ratio=0.2, last_ratio=0.1)
    linear = [annealed(step) for step in (0, 5, 10, 14, 62, 110)]
    assert linear == pytest.approx([0.2, 0.6, 1, 1, 0.1 + 0.9 * 0.48 / 0.95, 0.1])
    assert annealed(111) < 0.1
    assert [annealed(step, shape="cosine") for step in (10, 60, 110)] == pytest.approx([1, 0.55, 0.1])
    dropped = [schedules.milestones(step, -1, 10, epochs=[2, 4]) for step in (0, 19, 20, 40)]
    assert dropped == pytest.approx([1, 1, 0.1, 0.01])
    assert schedules.milestones(10**6, -1, -1) == 1
    with pytest.raises(ZooError, match="max_steps"):
        floored(0, total=-1)
    with pytest.raises(ZooError, match="max_steps"):
        annealed(0, total=-1)
    with pytest.raises(ZooError, match="'cosine' or 'linear', got 'square'"):
        annealed(0, shape="square")
    with pytest.raises(ZooError, match="length of an epoch"):
        schedules.milestones(0, -1, -1, epochs=[2])


@pytest.mark.parametrize(("epoch", "epochs"), [(8, 3), (7, 3), (39, 2), (1, 4)])
def test_a_late_cosine_is_one_scheduler_of_torch_after_another(epoch, epochs):
    rate, least, warmup = 7.2e-5, 4e-5, 0.5 * epoch
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], rate)
    rising = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1e-9, total_iters=warmup)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * epoch - warmup, eta_min=least)
    for step in range(epochs * epoch + 1):
        if step:
            optimizer.step()
            (rising if step <= warmup else falling).step()
        factor = schedules.late_cosine(step, epochs * epoch, epoch, warmup_epochs=0.5, min_ratio=least / rate)
        assert rate * factor == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6, abs=1e-12)


def test_a_late_cosine_waits_and_then_is_the_same_one():
    schedule = partial(schedules.late_cosine, warmup_epochs=0.5, min_ratio=0.1)
    late = [schedule(step, 14, 7, start_epochs=0.5) for step in range(15)]  # 3.5 steps: the fourth is the first
    assert late == [0] * 4 + [schedule(step, 14, 7) for step in range(11)]
    assert schedules.late_cosine(0, 14, 7, start_epochs=1) == 0
    assert schedules.late_cosine(7, 14, 7, start_epochs=1) == 1
    with pytest.raises(ZooError, match="max_epochs"):
        schedule(0, -1, 7)

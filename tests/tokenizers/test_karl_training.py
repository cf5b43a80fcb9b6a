"""Both stages of KARL's training."""

from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from karl_helpers import make

import zoo
from zoo import ZooError
from zoo.tokenizers.karl.tokenizer import QUALITY_BINS
from zoo.tokenizers.karl.training import KarlFinetuning, KarlPretraining, QualityDistribution, halting_loss

ROOT = Path(__file__).parents[2]
adamw = partial(torch.optim.AdamW, lr=1e-4, fused=True)


def images(count=4):
    noise = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    return 0.5 + torch.linspace(0.1, 0.9, count).view(-1, 1, 1, 1) * (noise - 0.5)


def pretraining(name="karl-small-vqgan", **options):
    return KarlPretraining(make(name).train(), budget_step=4, optimizers={"tokenizer": adamw}, **options)


def finetuning(name="karl-small-vqgan", weight=0.2, **options):
    optimizers = {"tokenizer": adamw, "discriminator": adamw}
    options = {"adversarial_weights": [[0, weight]], "perceptual_weight": 0.0, "discriminator_width": 8} | options
    torch.manual_seed(1)
    module = KarlFinetuning(make(name).train(), budget_step=4, optimizers=optimizers, **options)
    module.adversarial_weight = weight
    return module


def noise(module, count=4):
    if "vqgan" in module.tokenizer.info.name:
        return None
    return torch.randn(count, 8, 8, 8, generator=torch.Generator().manual_seed(6))


def test_bins_from_the_smallest_error_of_the_batch_on_become_rarer():
    quality = QualityDistribution((0.01, 0.02, 0.03, 0.05))
    assert quality.probabilities.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    quality.update(torch.tensor([0.4, 0.02]))  # the smallest counts; a bin that equals it is reached
    expected = torch.tensor([1, 0.99, 0.99, 0]) / 2.98
    torch.testing.assert_close(quality.probabilities, expected)
    before = quality.probabilities.clone()
    quality.update(torch.tensor([0.06]))
    torch.testing.assert_close(quality.probabilities, before)
    assert set(quality.draw(1000).tolist()) == {0, 1, 2}


def test_the_last_tokens_are_taught_to_halt_each_part_with_its_own_mean():
    logits = torch.tensor([[0.0, 0.0, 100.0, -100.0]])
    losses = halting_loss(logits, 2)
    assert losses["active"].item() == pytest.approx(0.6931, abs=1e-4)
    assert losses["halted"].item() == pytest.approx(50)
    assert halting_loss(logits, 0).keys() == {"active"}


def test_the_base_is_frozen_in_the_first_stage_and_not_in_the_second():
    for module, moves in ((pretraining(), False), (finetuning("karl-small-vae"), True)):
        module.both_phases(images(), 24, torch.tensor([0, 1, 2, 3]), noise(module)).loss.backward()
        tokenizer = module.tokenizer
        for part in (tokenizer.base.encoder, tokenizer.base.decoder):
            assert any(p.grad is not None and p.grad.any() for p in part.parameters()) is moves
        without = [
            n for n, p in tokenizer.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
        ]
        assert without == []


def test_the_codebook_of_the_base_stays_as_it_was():
    module = finetuning()
    module.both_phases(images(), 24, torch.tensor([0, 1, 2, 3])).loss.backward()
    codebook = module.tokenizer.base.quantizer.codebook
    assert codebook.grad is None
    groups = module.optimized()["tokenizer"].parameters()
    assert not any(p is codebook and p.requires_grad for p in groups)


def test_masks_of_a_batch_are_mixed_only_when_asked_for():
    outputs = {}
    for order in ("per_image", "official"):
        for count in (1, 4):
            module = pretraining(mask_order=order)
            iteration = module.both_phases(images()[:count], 24, torch.zeros(count, dtype=torch.int64))
            outputs[order, count] = iteration.second.output[0]
    torch.testing.assert_close(outputs["per_image", 4], outputs["per_image", 1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(outputs["official", 1], outputs["per_image", 1])
    assert (outputs["official", 4] - outputs["official", 1]).abs().max() > 1e-4


def test_discriminators_stand_apart_unless_the_published_mistake_is_wanted():
    module = finetuning(gradient_clip=1.0)
    own, theirs = (set(map(id, part.parameters())) for part in (module.tokenizer, module.discriminators))
    assert set(map(id, module.optimized()["tokenizer"].parameters())) == own
    module = finetuning(discriminators_in_generator=True)
    theirs = set(map(id, module.discriminators.parameters()))
    parameters = list(module.optimized()["tokenizer"].parameters())
    assert theirs <= set(map(id, parameters))
    assert not theirs & set(map(id, module.clipped("tokenizer", parameters)))
    assert module.clipped("discriminator", parameters) == parameters


def fit(module, ckpt_path=None, **options):
    data = torch.utils.data.DataLoader([{"image": image} for image in images(6)], batch_size=2)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, **options,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


def test_a_run_that_goes_on_from_a_checkpoint_is_the_same_run(tmp_path):
    """With all that is random: budgets, qualities and the distribution from which these are drawn."""
    whole, first, second = pretraining(), pretraining(), pretraining()
    start = torch.full((len(QUALITY_BINS),), 1 / len(QUALITY_BINS))  # some bins are above the errors of this network
    for module in (whole, first, second):
        module.quality.probabilities.copy_(start)
    fit(whole, max_epochs=2)
    fit(first, max_epochs=1).save_checkpoint(tmp_path / "last.ckpt")
    fit(second, tmp_path / "last.ckpt", max_epochs=2)
    assert second.quality.probabilities.ne(start).any()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name


def test_passes_alternate_and_each_trains_its_own(watch):
    """Of three iterations the third is the tokenizer's."""
    module = finetuning(discriminator_every=3)
    trainer = fit(module, callbacks=[watch], max_epochs=1)
    assert watch.moved == [{"discriminators"}, {"discriminators"}, {"tokenizer"}]
    assert trainer.global_step == 3


def test_options_that_cannot_be_are_refused():
    with pytest.raises(ZooError, match="mask_order must be 'per_image' or 'official'"):
        pretraining(mask_order="mixed")
    with pytest.raises(ZooError, match="budget_step must be from 1 to trained_slots=92, got 100"):
        KarlPretraining(make(), budget_step=100, optimizers={})
    with pytest.raises(ZooError, match=r"starts from a trained vqgan-f16: get .*, and name it in module.base_weights"):
        pretraining(base="vqgan-f16")
    with pytest.raises(ZooError, match=r"module.base=vqgan-tiny is VQGANConfig"):
        pretraining(base="vqgan-tiny")


STAGES = {
    "pretrain": partial(pretraining),
    "pretrain-vae": partial(pretraining, "karl-small-vae-continuous"),
    "generator": partial(finetuning),
    "discriminator": partial(finetuning),
}


def iterate(stage, rows):
    module = STAGES[stage]()
    module.discriminates = stage == "discriminator"
    bins, drawn = torch.tensor([0, 1, 2, 3])[rows], noise(module)
    iteration = module.both_phases(images()[rows], 24, bins, None if drawn is None else drawn[rows])
    iteration.loss.backward()
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    norms = torch.cat([grad.flatten() for grad in grads])
    return iteration.loss.detach(), norms, module.quality.probabilities


def run_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save({s: iterate(s, slice(2 * rank, 2 * rank + 2)) for s in STAGES}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_have_the_loss_and_gradient_of_one_with_twice_the_batch(tmp_path):
    mp.spawn(run_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for stage in STAGES:
        loss, grads, probabilities = iterate(stage, slice(0, 4))
        torch.testing.assert_close((first[stage][0] + second[stage][0]) / 2, loss, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close((first[stage][1] + second[stage][1]) / 2, grads, rtol=1e-3, atol=1e-5)
        assert torch.equal(first[stage][2], second[stage][2])
        torch.testing.assert_close(first[stage][2], probabilities)


SMALL = [
    *("trainer.limit_train_batches=3", "trainer.val_check_interval=3", "data.num_workers=0"),
    *("tokenizer.encoder_width=48", "tokenizer.encoder_depth=1", "tokenizer.decoder_width=32"),
    *("tokenizer.decoder_depth=1", "optimizer._target_=torch.optim.SGD", "~optimizer.betas", "schedule.warmup_steps=0"),
]


def test_both_stages_run_on_two_ranks_as_on_one(tmp_path, train_on):
    """The true command; gradient norms are those of the gradients averaged over ranks."""
    start, stage2 = tmp_path / "1/pretrain/tokenizer.safetensors", ["module.adversarial_weights=[[0,0.2]]"]
    stage2 += [f"weights={start}", "module.discriminator_every=2", "optimizer.lr=1e-2"]
    for stage, overrides in (("pretrain", ["optimizer.lr=1e-2"]), ("finetune", stage2)):
        one, two = (train_on(n, tmp_path / f"{n}/{stage}", f"karl-{stage}-tiny", *SMALL, *overrides) for n in (1, 2))
        for key in one:
            if "gradient_norm" in key:
                assert two[key] == pytest.approx(one[key], rel=1e-3), key
        states = [
            zoo.load_tokenizer("karl-tiny", weights=tmp_path / f"{n}/{stage}/tokenizer.safetensors").state_dict()
            for n in (1, 2)
        ]
        for name, tensor in states[0].items():
            torch.testing.assert_close(states[1][name], tensor, rtol=1e-3, atol=1e-5)

"""How DualToken is trained."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hydra.errors import InstantiationException
from hydra.utils import instantiate

import zoo
from zoo import registry
from zoo.commands import cli
from zoo.data import Loader, scenes

SGD = ["optimizer._target_=torch.optim.SGD", "~optimizer.betas", "optimizer.lr=1e-2", "schedule.warmup_steps=0"]
GAN = [
    *("module.adversarial_weight=0.75", "module.discriminator_width=32"),
    "+module.optimizers.discriminator=${optimizer}",
]
SMALL = [f"tokenizer.{name}" for name in ("decoder.channels=8", "semantic.levels=2", "pixel.levels=2")]
EXACT = "callbacks.ema.decay=0.0"  # an average of equal weights is rounded
TOWER = "encoder.vision"


def module(stage, *overrides):
    torch.manual_seed(0)
    cfg = cli.compose("train", [f"experiment=dualtoken-tiny-{stage}", *overrides])
    made = instantiate(cfg.module, tokenizer=instantiate(cfg.tokenizer))
    made.kept = SimpleNamespace(global_step=0, current_epoch=0, num_training_batches=2, world_size=1)
    made._trainer = made.kept  # all that a loss asks of a trainer
    return made


@pytest.fixture(scope="module")
def batch():
    return next(iter(Loader(scenes("val"), batch_size=4, fields=["image"])))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, train_on):
    """Folders of stage 1 on one rank and on two, with a discriminator; what they logged; stages 0 and 2."""
    folder = tmp_path_factory.mktemp("dualtoken")
    options = [EXACT, *SMALL]
    train_on(1, folder / "0", "dualtoken-tiny-0", *options)
    start = f"weights={folder}/0/tokenizer.safetensors"
    logs = [train_on(n, folder / f"1-{n}", "dualtoken-tiny-1", start, *options, *SGD, *GAN) for n in (1, 2)]
    train_on(1, folder / "2", "dualtoken-tiny-2", f"weights={folder}/1-1/tokenizer.safetensors", *options)
    return folder, logs


def load(folder):
    return zoo.load_tokenizer("dualtoken-tiny", weights=folder / "tokenizer.safetensors")


def test_two_ranks_train_as_one(trained):
    folder, (one, two) = trained
    for name in ("gradient_norm/tokenizer", "gradient_norm/discriminator", "adversarial_weight", "codebook_use/pixel"):
        assert two[f"train/{name}"] == pytest.approx(one[f"train/{name}"], rel=1e-3), name
        assert two[f"train/{name}"][0] == pytest.approx(one[f"train/{name}"][0], rel=1e-5), name
    assert {"val/features_cosine", "val/pooled_cosine", "val/psnr"} <= two.keys()
    expected = load(folder / "1-1").state_dict()
    for name, tensor in load(folder / "1-2").state_dict().items():
        # a vector between two codes may go to either, by rounding
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-3)


def test_each_stage_trains_its_parts(trained):
    folder, _ = trained
    states = [load(folder / stage).state_dict() for stage in ("0", "1-1", "2")]
    teacher = {f"encoder.{name}": tensor for name, tensor in zoo.load_encoder("siglip-tiny").state_dict().items()}
    stages = [({**states[0], **teacher}, states[0]), states[:2], states[1:]]
    moved = [{name for name in one if not torch.equal(one[name], two[name])} for one, two in stages]
    assert not any(name.startswith("encoder.text") or "logit" in name for names in moved for name in names)
    towers = [{name.split(".")[3] for name in names if name.startswith(f"{TOWER}.blocks")} for names in moved]
    assert towers == [{"3"}, {"0", "1", "2", "3"}, {"2", "3"}]
    assert f"{TOWER}.pos_embed" in moved[1]
    assert f"{TOWER}.pos_embed" not in moved[0] | moved[2]
    others = {name.split(".")[0] for name in moved[2] if not name.startswith(TOWER)}
    assert others == {"prequant_semantic", "postquant_semantic", "quantizers"}
    assert not any(name.startswith("quantizers.pixel") for name in moved[2])


def test_the_loss_is_what_the_recipe_says(batch):
    made = module(1)
    made.tokenizer.quantizers.eval()
    (name, loss, logs), *rest = made.losses(batch)
    assert (name, rest) == ("tokenizer", [])
    values, tower = 2 * batch["image"] - 1, zoo.load_encoder("siglip-tiny").vision
    with torch.no_grad():
        output = made.tokenizer(values)
        features = tower.layers(tower.embed(values), stop=3)
        pooled = tower(values)
    expected = {
        "features_mse": 0.25 * F.mse_loss(output.features, features),
        "features_cosine": -5 * F.cosine_similarity(output.features, features, dim=-1).mean(),
        "pooled_mse": 0.1 * F.mse_loss(output.pooled, pooled),
        "pooled_cosine": -F.cosine_similarity(output.pooled, pooled, dim=-1).mean(),
        "quantizer_semantic": 5 * output.quantized["semantic"].loss,
        "quantizer_pixel": 5 * output.quantized["pixel"].loss,
        "pixels": 20 * F.mse_loss(output.reconstruction, values),
    }
    for term, value in expected.items():
        torch.testing.assert_close(made.weights[term] * logs[term], value)
    torch.testing.assert_close(loss.detach(), sum(expected.values()))


def test_the_discriminator_learns_after_the_tokenizer_and_from_the_same_reconstructions(batch):
    made = module(1, *GAN)
    steps = {name: logs for name, _, logs in made.losses(batch)}
    assert list(steps) == ["tokenizer", "discriminator"]
    assert 0.3 <= steps["tokenizer"]["adversarial_weight"] <= 10
    torch.testing.assert_close(-steps["tokenizer"]["adversarial"], steps["discriminator"]["logits_fake"])
    assert all(p.requires_grad for p in made.discriminator.parameters())


def test_the_discriminator_begins_at_its_step_and_weighs_less_after_that_epoch(batch):
    made = module(1, *GAN, "module.adversarial_start=3")
    assert [name for name, *_ in made.losses(batch)] == ["tokenizer"]
    made.kept.global_step = 3
    assert [name for name, *_ in made.losses(batch)] == ["tokenizer", "discriminator"]
    factors = []
    for made.kept.current_epoch in (0, 1, 2):  # two batches an epoch
        factors.append(made.discriminator_factor())
    assert factors == [0.75, 1.0, 0.75]


def test_the_second_stage_makes_no_pictures_and_moves_no_pixel_code(batch):
    made = module(2)
    before = {name: buffer.clone() for name, buffer in made.tokenizer.named_buffers()}
    made.tokenizer.decoder.forward = None  # would fail
    ((_, _, logs),) = made.losses(batch)
    assert "pixels" not in logs
    moved = [name for name, buffer in made.tokenizer.named_buffers() if not torch.equal(buffer, before[name])]
    assert moved
    assert all(name.startswith("quantizers.semantic") for name in moved)


def test_the_teacher_stays_as_it_is_whatever_the_mode():
    made = module(0)
    assert made.train().tokenizer.training
    assert not made.teacher.training
    assert not any(p.requires_grad for p in made.teacher.parameters())
    own, taught = made.tokenizer.encoder.vision.state_dict(), made.teacher.state_dict()
    assert all(torch.equal(own[name], taught[name]) for name in own)
    assert made.tokenizer.encoder.vision is not made.teacher


def test_a_later_stage_keeps_the_towers_it_was_given():
    made = module(1, "module.started_from=stage-0")
    own, taught = made.tokenizer.encoder.vision.state_dict(), made.teacher.state_dict()
    assert not torch.equal(own["pos_embed"], taught["pos_embed"])


@pytest.mark.parametrize(
    ("stage", "overrides", "complaint"),
    [
        (0, ["module.teacher.name=siglip-tin"], "no encoder is called 'siglip-tin'; did you mean siglip-tiny"),
        (0, ["tokenizer.encoder.depth=5"], "the teacher siglip-tiny has other sizes than the towers of dualtoken-tiny"),
        (0, ["+module.weights.pixel=1.0"], "the loss has no term 'pixel'; did you mean pixels"),
        (0, ["module.frozen_layers=5"], "frozen_layers must be -1 for none, or 0 to 4, got 5"),
        ("one-0", ["module.train_pixels=false"], "needs a pixel stream of its own"),
    ],
)
def test_what_does_not_fit_is_said_in_one_sentence(stage, overrides, complaint):
    with pytest.raises(InstantiationException, match=complaint):
        module(stage, *overrides)


@pytest.mark.parametrize("stage", [0, 1])
def test_one_codebook_trains_by_the_same_recipe(stage, batch):
    made = module(f"one-{stage}")
    ((_, loss, logs),) = made.losses(batch)
    loss.backward()
    assert made.tokenizer.info.levels == {"image": 8}
    assert {"quantizer_image", "pixels", "pooled_cosine"} <= logs.keys()
    trained = [name for name, p in made.tokenizer.named_parameters() if p.grad is not None]
    assert {name.split(".")[0] for name in trained} >= {"prequant_semantic", "postquant_pixel", "decoder"}


def test_the_published_recipes_are_those_of_the_authors():
    published = {
        0: ({"pooled_mse": 5, "pooled_cosine": 5, "lpips": 1, "pixels": 5}, 26, 1.0e-4),
        1: ({"features_mse": 5, "features_cosine": 5, "pooled_mse": 1, "pooled_cosine": 1}, -1, 7.2e-5),
        2: ({"features_cosine": 1, "pooled_mse": 5, "pooled_cosine": 5, "pixels": 0, "lpips": 0}, 4, 7.2e-5),
    }
    for stage, (factors, frozen, rate) in published.items():
        cfg = cli.compose("train", [f"experiment=dualtoken-{stage}", "weights=earlier.safetensors"])
        assert factors.items() <= dict(cfg.module.weights).items()
        assert (cfg.module.frozen_layers, cfg.optimizer.lr) == (frozen, rate)
        assert cfg.module.started_from == "earlier.safetensors"
        teacher = registry.encoders.preset(cfg.module.teacher.name).config
        assert registry.preset(cfg.tokenizer.name).config.encoder == teacher
    discriminator = instantiate(cli.compose("train", ["experiment=dualtoken-1"]).module.schedules.discriminator)
    epoch = 39_063
    rates = [7.2e-5 * discriminator(step, total=20 * epoch, epoch=epoch) for step in (19_531, 19_532, 39_063, 781_259)]
    assert rates[:2] == [0, 0]
    assert rates[2] == pytest.approx(7.2e-5, rel=1e-4)
    assert rates[3] == pytest.approx(4e-5, rel=1e-2)


def test_the_trained_tokenizer_loads_by_name_and_keeps_what_the_tower_knew():
    tokenizer, teacher = zoo.load_tokenizer("dualtoken-tiny"), zoo.load_encoder("siglip-tiny")
    batch = next(iter(Loader(scenes("val"), batch_size=64, fields=["image", "caption"])))
    images, texts = batch["image"], teacher.encode_text(batch["caption"])
    torch.testing.assert_close(tokenizer.encode_text(batch["caption"]), texts)
    right = torch.arange(64)
    found, known = ((one.encode_image(images) @ texts.T).argmax(1) == right for one in (tokenizer, teacher))
    assert found.sum() >= 0.9 * known.sum()
    errors = []
    for levels in (1, 2, 4):
        made = tokenizer.decode(tokenizer.encode(images, levels=levels))
        errors.append((-10 * (made - images).square().flatten(1).mean(1).log10()).mean().item())
    assert errors[0] < errors[1] < errors[2]
    assert errors[2] > 27
    assert registry.weights_path("dualtoken-tiny").stat().st_size <= 16e6

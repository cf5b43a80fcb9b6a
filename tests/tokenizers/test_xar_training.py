"""How xAR is trained."""

import pytest
import torch
from hydra.utils import instantiate

import zoo
from zoo import registry
from zoo.commands import cli
from zoo.data import Loader, scenes
from zoo.data.labels import COLOR_NAMES, class_field, dominant_color
from zoo.errors import ZooError
from zoo.quantizers import GaussianPosterior
from zoo.tokenizers.kl.tokenizer import KLConfig
from zoo.tokenizers.xar.generator import check_space

SMALL = [
    *("generator.width=32", "generator.encoder_depth=1", "generator.decoder_depth=1", "generator.encoder_heads=2"),
    *("generator.decoder_heads=2", "generator.num_steps=2", "data.num_workers=0"),
]


def module(*overrides):
    cfg = cli.compose("train", ["experiment=xar-tiny", *SMALL, *overrides])
    made = instantiate(cfg.module, tokenizer=instantiate(cfg.tokenizer))
    made._trainer = type("Alone", (), {"world_size": 1, "global_rank": 0})()  # all that a loss asks of a trainer
    return made


@pytest.fixture(scope="module")
def batch():
    return next(iter(Loader(scenes("val"), batch_size=4, fields=["image", "objects"])))


def test_two_ranks_train_as_one(tmp_path, train_on):
    sgd = ("optimizer._target_=torch.optim.SGD", "~optimizer.betas", "optimizer.lr=1e-2", "schedule.warmup_steps=0")
    one, two = (train_on(n, tmp_path / str(n), "xar-tiny", *SMALL, *sgd) for n in (1, 2))
    assert two["train/gradient_norm/generator"] == pytest.approx(one["train/gradient_norm/generator"], rel=1e-4)
    states = [
        zoo.load_generator("xar-tiny", weights=tmp_path / f"{n}/generator.safetensors").state_dict() for n in (1, 2)
    ]
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-4, atol=1e-6)
    assert (tmp_path / "1/pictures/step-0000004.png").is_file()


def test_a_training_reads_the_latents_that_pretokenize_wrote(tmp_path, zoo_command, train_on):
    shards = tmp_path / "latents"
    what = ("tokenizer=kl-tiny", "data=scenes", "split=val", "data.fields=[image,objects]", "flip=true", "num_shards=2")
    zoo_command("pretokenize", *what, "data.num_workers=0", "device=cpu", f"output_dir={shards}")
    data = ("data=shards", f"data.train='{shards}/{{00000..00001}}.tar'", f"data.val={shards}/00000.tar")
    metrics = train_on(1, tmp_path / "run", "xar-tiny", *data, "data.fields=[moments,objects]", *SMALL)
    assert len(metrics["train/loss"]) == 4


def test_a_training_can_start_from_a_trained_generator(tmp_path):
    torch.manual_seed(0)
    trained = module().generator
    registry.save(trained, tmp_path / "generator.safetensors")
    started = module(f"module.generator_weights={tmp_path}/generator.safetensors").generator
    assert started.training
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(started.parameters(), trained.parameters(), strict=True)
    )


def test_cached_moments_give_the_loss_of_the_images(batch):
    training = module("generator.label_dropout=0.0")
    space = training.tokenizer
    with torch.no_grad():
        moments = space.moments(space.config.to_values(batch["image"]))
    cached = {"moments": moments[:, None], "objects": batch["objects"]}
    losses = [training.flow_loss(b, torch.Generator().manual_seed(0), drop=True) for b in (batch, cached)]
    torch.testing.assert_close(*losses)


def test_each_image_takes_one_of_its_cached_views():
    training = module()
    views = torch.zeros(4, 2, 16, 8, 8)
    views[:, 1, :8] = 1
    views[:, :, 8:] = -30  # no variance
    latents = training.latents({"moments": views}, torch.tensor([0.0, 0.49, 0.5, 0.99]), torch.zeros(4, 8, 8, 8))
    assert latents.mean((1, 2, 3)).tolist() == pytest.approx([0, 0, 0.62, 0.62])


def test_latents_are_drawn_anew_from_the_posterior(batch):
    training, space = module(), zoo.load_tokenizer("kl-tiny")
    noise = torch.randn(4, 8, 8, 8)
    with torch.no_grad():
        posterior: GaussianPosterior = space.posterior(space.config.to_values(batch["image"]))
    torch.testing.assert_close(training.latents(batch, torch.zeros(4), noise), 0.62 * posterior.sample(noise))


def test_the_generator_is_what_is_compiled():
    training = module("module.compile=true")
    training.setup("fit")
    assert training.generator._compiled_call_impl is not None
    assert training.tokenizer._compiled_call_impl is None


def test_the_tokenizer_stays_frozen_and_in_evaluation_mode():
    training = module().train()
    assert not training.tokenizer.training
    assert not any(p.requires_grad for p in training.tokenizer.parameters())
    assert training.generator.training


def test_the_validation_loss_has_no_dropout(batch):
    training = module("generator.label_dropout=1.0")
    draws = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    with torch.no_grad():
        training.generator.class_embedding.weight[-1] += 1  # "no class"
        kept, dropped = (training.flow_loss(batch, draws(), drop) for drop in (False, True))
    assert not torch.allclose(kept, dropped)


def test_any_continuous_tokenizer_can_be_the_space(batch):
    """A KARL tokenizer on a KL autoencoder: all of its tokens, in their order."""
    base = KLConfig(image_size=64, channels=8, multipliers=(1, 1, 1), num_blocks=1, norm_groups=4, attention=())
    sizes = {"encoder_width": 32, "encoder_depth": 1, "decoder_width": 32, "decoder_depth": 1, "max_tokens": 16}
    heads = {"encoder_heads": 2, "decoder_heads": 2}
    karl = zoo.create_tokenizer("karl-tiny-vae-continuous", base=base, image_size=64, **sizes, **heads).eval()
    width = karl.info.latent_dims["image"]
    training = module()
    training.tokenizer = karl
    training.generator = zoo.create_generator("xar-tiny", grid=4, latent_dim=width, entity_size=2, width=48).eval()
    check_space(training.generator, karl)
    assert training.latents(batch, torch.zeros(4), torch.zeros(4, width, 4, 4)).shape == (4, width, 4, 4)
    assert training.pictures(batch, 2).shape == (16, 3, 64, 64)


def test_the_class_of_a_scene_is_the_colour_that_covers_most():
    thing = {"color": "red", "visible": 0.1}
    objects = [[thing, thing, {"color": "blue", "visible": 0.15}], [{"color": "pink", "visible": 0.01}]]
    assert [COLOR_NAMES[i] for i in dominant_color({"objects": objects})] == ["red", "pink"]


def test_labels_that_are_not_there_are_asked_for():
    with pytest.raises(ZooError, match=r"has no field 'objects'.*add it to data.fields"):
        dominant_color({"image": 0})
    with pytest.raises(ZooError, match=r"has no field 'class'.*add it to data.fields"):
        class_field({"image": 0})
    assert class_field({"class": [3, 1]}).tolist() == [3, 1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_is_skipped_and_named(value, capsys, tmp_path):
    """Latents with NaN, as a broken shard or a half-precision encoder gives them: `max_bad_steps` ends the run."""
    import lightning as L

    training = module("module.max_bad_steps=1", "schedule.warmup_steps=0", "trainer.max_steps=4")
    rest = {"moments": torch.full((1, 1, 16, 8, 8), value), "objects": [[{"color": "red", "visible": 1.0}]]}
    batches = [{"key": [f"image-{i}"]} | rest for i in range(4)]
    before = {name: p.clone() for name, p in training.generator.named_parameters()}
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_steps=4, accelerator="cpu", **quiet)
    with pytest.raises(
        ZooError,
        match=r"2 steps in a row had no finite loss and gradient of the generator, the last on the batch of image-1",
    ):
        trainer.fit(training, torch.utils.data.DataLoader(batches, batch_size=None))
    assert "step 1 was skipped: the loss of the generator is not finite (batch of image-0)" in capsys.readouterr().out
    assert all(torch.equal(p, before[name]) for name, p in training.generator.named_parameters())

"""The flow decoder of SEED: images of embeddings, and how it is trained."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import load_file

import zoo
from zoo import ZooError, registry
from zoo.commands import cli
from zoo.data import Loader, scenes
from zoo.tokenizers.seed.decoder import FlowDecoderConfig, check_space, grid_positions

SIZES = {"width": 16, "depth": 2, "num_heads": 2, "modulation_rank": 8, "num_steps": 2}
SMALL = [*(f"decoder.{name}={value}" for name, value in SIZES.items()), "module.measured_images=16"]


def make(**changes):
    """A decoder with all weights and statistics drawn, since a fresh network is zero everywhere."""
    torch.manual_seed(0)
    decoder = zoo.create_decoder("seed-tiny-decoder", **SIZES | changes).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        decoder.mean.normal_()
        decoder.std.uniform_(0.5, 2)
    return decoder


def embeddings(count=3):
    return 2 * torch.randn(count, 128, generator=torch.Generator().manual_seed(1))


def generators(count):
    return [torch.Generator().manual_seed(i) for i in range(count)]


def latents(decoder, *arguments, **settings):
    return decoder.sample(*arguments, **settings).latents["image"]


@pytest.fixture(scope="module")
def decoder():
    return make()


def test_embeddings_become_images(decoder):
    images = decoder.decode(embeddings())
    assert images.shape == (3, 3, 64, 64)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    assert not images.requires_grad
    assert not torch.allclose(images[0], images[1], atol=1e-3)
    assert zoo.load_tokenizer("kl-tiny").decode(decoder.sample(embeddings())).equal(images)


@pytest.mark.parametrize("drawn", ["one noise for all", "a generator for each"])
def test_a_batch_equals_its_images_one_by_one(decoder, drawn):
    own = drawn == "a generator for each"
    settings = {"guidance": 1.5, "noise_level": 0.3}
    batch = decoder.decode(embeddings(), **settings, generator=generators(3) if own else None)
    for i in range(3):
        alone = decoder.decode(embeddings()[i : i + 1], **settings, generator=generators(3)[i : i + 1] if own else None)
        torch.testing.assert_close(alone, batch[i : i + 1], rtol=1e-4, atol=1e-4)


def test_an_image_depends_on_the_seed_and_on_nothing_else_that_is_random(decoder):
    torch.manual_seed(1)
    one = latents(decoder, embeddings(), noise_level=0.5)
    torch.manual_seed(2)
    assert torch.equal(latents(decoder, embeddings(), noise_level=0.5), one)
    assert not torch.allclose(latents(decoder, embeddings(), noise_level=0.5, seed=1), one, atol=1e-2)


def test_images_start_from_one_noise_unless_each_has_its_generator(decoder):
    same = embeddings(1).expand(2, -1)
    one, other = latents(decoder, same)
    torch.testing.assert_close(one, other)
    one, other = latents(decoder, same, generator=generators(2))
    assert not torch.allclose(one, other, atol=1e-2)


def test_guidance_of_1_is_none_and_of_0_knows_no_embedding():
    decoder = make()
    assert torch.equal(latents(decoder, embeddings(), guidance=1), latents(make(guidance=1.0), embeddings()))
    plain, guided = (latents(decoder, embeddings(), guidance=scale) for scale in (1.0, 3.0))
    unguided = latents(decoder, embeddings(), guidance=0.0)
    torch.testing.assert_close(unguided[0], unguided[1])
    assert not torch.allclose(plain, guided, atol=1e-2)
    with torch.no_grad():
        decoder.no_embedding += 1
    assert torch.equal(latents(decoder, embeddings(), guidance=1.0), plain)
    assert not torch.allclose(latents(decoder, embeddings(), guidance=3.0), guided, atol=1e-2)


def test_noise_hides_the_embedding_and_leaves_the_start_as_it_is(decoder):
    settings = {"guidance": 1.0, "num_steps": 1}
    spread = [latents(decoder, embeddings(), noise_level=level, **settings).std(0).mean() for level in (0.0, 0.5, 1.0)]
    assert spread[0] > spread[1] > spread[2]
    assert spread[2] < 1e-5
    blind = make()
    with torch.no_grad():
        blind.output.linear.weight.zero_()
        blind.output.linear.bias.zero_()
    exact, noisy = (latents(blind, embeddings(), noise_level=level) for level in (0.0, 0.5))
    assert torch.equal(exact, noisy)


def test_the_network_is_told_the_noise_level(decoder):
    x, z = torch.randn(2, 64, 8), torch.randn(2, 128)
    t, levels = torch.full((2,), 0.5), torch.tensor([0.0, 0.5])
    with torch.no_grad():
        told = decoder(x[:1].expand(2, -1, -1), t, z[:1].expand(2, -1), levels)
    assert not torch.allclose(told[0], told[1], atol=1e-3)


def test_embeddings_are_whitened_with_the_statistics_of_the_file(decoder):
    moved, plain = make(), make()
    moved.mean += 1
    torch.testing.assert_close(latents(moved, embeddings() + 1), latents(plain, embeddings()), rtol=1e-4, atol=1e-4)


def test_a_fresh_network_is_zero_and_its_blocks_the_identity():
    fresh = zoo.create_decoder("seed-tiny-decoder", **SIZES)
    x, h = torch.randn(2, 64, 8), torch.randn(2, 68, 16)
    assert fresh(x, torch.rand(2), torch.randn(2, 128), torch.rand(2)).abs().max() == 0
    assert torch.equal(fresh.blocks[0](h, torch.randn(2, 16)), h)


def test_positions_tell_all_places_apart():
    positions = grid_positions(8, 16)
    assert positions.shape == (64, 16)
    assert len(positions.unique(dim=0)) == 64
    assert torch.equal(positions[:8, :8], positions[:1, :8].expand(8, -1))  # a row has one half in common


def test_the_embedding_can_do_without_tokens_of_its_own():
    decoder = make(condition_tokens=0)
    assert decoder.token_proj is None
    assert latents(decoder, embeddings()).shape == (3, 64, 8)


def test_half_precision_decodes_to_float32(decoder):
    images = make().to(torch.bfloat16).decode(embeddings())
    assert images.dtype == torch.float32
    assert (images - decoder.decode(embeddings())).abs().mean() < 0.05


def test_a_saved_decoder_comes_back_without_the_tokenizer_it_uses(tmp_path, decoder):
    images = decoder.decode(embeddings())
    registry.save(decoder, tmp_path / "decoder.safetensors")
    assert not [name for name in load_file(tmp_path / "decoder.safetensors") if name.startswith("tokenizer")]
    loaded = zoo.load_decoder("seed-tiny-decoder", weights=tmp_path / "decoder.safetensors")
    assert loaded.config == decoder.config
    assert torch.equal(loaded.mean, decoder.mean)
    assert torch.equal(loaded.decode(embeddings()), images)
    with pytest.raises(ZooError, match="holds the system 'seed', and aurora-tiny is of another"):
        zoo.load_tokenizer("aurora-tiny", weights=tmp_path / "decoder.safetensors")


def test_decoders_are_listed_beside_tokenizers(capsys):
    from zoo.commands import info, list

    assert "seed-tiny-decoder" in zoo.list_decoders("seed*")
    assert "seed-tiny-decoder" not in zoo.list_tokenizers()
    list.main(["seed-tiny-decoder"])
    info.main(["seed-tiny-decoder"])
    assert "condition_tokens" in capsys.readouterr().out


def test_the_shipped_sizes_fit_beside_the_other_checkpoints():
    with torch.device("meta"):
        decoder = zoo.create_decoder("seed-tiny-decoder")
    assert sum(p.numel() for p in decoder.parameters()) <= 4.0e6
    info = decoder.info
    assert (info.system, info.encoder, info.embed_dim, info.image_size) == ("seed", "siglip-tiny", 128, 64)
    assert info.embed_dim == registry.encoders.preset(info.encoder).config.width
    check_space(decoder, zoo.create_tokenizer(info.tokenizer))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"condition_tokens": -1}, "condition_tokens must be at least 0"),
        ({"width": 18, "num_heads": 4}, "width 18 must be a multiple of num_heads 4"),
        ({"width": 6, "num_heads": 2}, "and of 4"),
        ({"condition_dropout": 1.5}, "share from 0 to 1, got 1.5"),
        ({"guidance": -1.0}, "guidance must not be below 0"),
        ({"guidance": float("nan")}, "guidance must not be below 0"),
    ],
)
def test_sizes_that_are_not_possible_are_refused(change, complaint):
    with pytest.raises(ZooError, match=complaint):
        replace(FlowDecoderConfig(), **change)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ([0.0], r"takes float embeddings \(B, 128\) of siglip-tiny, got list"),
        (torch.zeros(2, 128, dtype=torch.int64), "got torch.int64"),
        (torch.zeros(2, 64), r"got shape \(2, 64\)"),
        (torch.zeros(128), r"got shape \(128,\)"),
        (torch.zeros(0, 128), r"got shape \(0, 128\)"),
        (torch.full((2, 128), float("nan")), "not finite"),
    ],
)
def test_what_is_no_embedding_is_refused(decoder, wrong, complaint):
    with pytest.raises(ZooError, match=complaint):
        decoder.decode(wrong)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"num_steps": 0}, "integer of at least 1 and at most 100000, got 0"),
        ({"num_steps": 2.0}, "integer of at least 1 and at most 100000, got 2.0"),
        ({"guidance": -0.1}, "guidance must not be below 0"),
        ({"guidance": float("inf")}, "guidance must not be below 0"),
        ({"guidance": "much"}, "guidance must not be below 0"),
        ({"noise_level": 1.1}, "noise_level must be from 0 to 1, got 1.1"),
        ({"noise_level": float("nan")}, "noise_level must be from 0 to 1"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
        ({"generator": torch.Generator()}, "list of 3 torch.Generator"),
        ({"generator": generators(2)}, "list of 3 torch.Generator"),
        ({"generator": [0, 1, 2]}, "list of 3 torch.Generator"),
    ],
)
def test_settings_that_are_not_possible_are_refused(decoder, settings, complaint):
    with pytest.raises(ZooError, match=complaint):
        decoder.decode(embeddings(), **settings)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"tokenizer": "vqgan-tiny"}, "vqgan-tiny has discrete tokens"),
        ({"grid": 4}, "makes 4 x 4 latents of 8 values .* kl-tiny has 64 of 8 .* set decoder.grid"),
        ({"latent_dim": 16}, "set decoder.grid, decoder.latent_dim"),
        ({"image_size": 128}, "for images of 128 pixels"),
    ],
)
def test_a_tokenizer_with_other_latents_is_refused(change, complaint):
    with pytest.raises(ZooError, match=complaint):
        make(**change).decode(embeddings())


def configuration(*overrides):
    return cli.compose("train", ["experiment=seed-decoder-tiny", *SMALL, *overrides])


def module(*overrides):
    cfg = configuration(*overrides)
    made = instantiate(cfg.module, tokenizer=instantiate(cfg.tokenizer))
    made._trainer = type("Alone", (), {"world_size": 1, "global_rank": 0})()  # all that a loss asks of a trainer
    return made


def randomised(training):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in training.decoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return training


def fit(cfg, *callbacks):
    """Train in this process; returns the module."""
    import lightning as L

    training = instantiate(cfg.module, tokenizer=instantiate(cfg.tokenizer))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        max_steps=4, limit_val_batches=0, accelerator="cpu", enable_model_summary=False, callbacks=[*callbacks], **quiet
    )
    trainer.fit(training, datamodule=instantiate(cfg.data))
    return training


@pytest.fixture(scope="module")
def batch():
    return next(iter(Loader(scenes("val"), batch_size=4)))


def loss(training, batch, seed=0, **settings):
    with torch.no_grad():
        return training.flow_loss(batch, torch.Generator().manual_seed(seed), **settings)


def test_two_ranks_train_as_one(tmp_path, train_on):
    sgd = ("optimizer._target_=torch.optim.SGD", "~optimizer.betas", "optimizer.lr=1e-2", "schedule.warmup_steps=0")
    one, two = (train_on(n, tmp_path / str(n), "seed-decoder-tiny", *SMALL, *sgd) for n in (1, 2))
    assert two["train/gradient_norm/decoder"] == pytest.approx(one["train/gradient_norm/decoder"], rel=1e-4)
    states = [
        zoo.load_decoder("seed-tiny-decoder", weights=tmp_path / f"{n}/decoder.safetensors").state_dict()
        for n in (1, 2)
    ]
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-4, atol=1e-6)
    assert torch.equal(states[0]["mean"], states[1]["mean"])
    assert torch.equal(states[0]["std"], states[1]["std"])
    assert (tmp_path / "1/pictures/step-0000004.png").is_file()


def test_a_few_steps_change_the_whole_decoder_and_nothing_else(watch):
    cfg = configuration("data.batch_size=8", "schedule.warmup_steps=0", "decoder.condition_dropout=0.5")
    fresh = instantiate(cfg.decoder)
    training = fit(cfg, watch)
    assert watch.moved == [{"decoder"}] * 4
    torch.manual_seed(0)
    for name, parameter in training.decoder.named_parameters():
        assert not torch.equal(parameter, fresh.state_dict()[name]), name
    assert not training.tokenizer.training
    assert not training.teacher.training
    assert not [p for part in (training.tokenizer, training.teacher) for p in part.parameters() if p.requires_grad]


def test_the_statistics_are_those_of_the_first_batches(tmp_path):
    cfg = configuration("data.batch_size=8", "module.measured_images=20")  # three batches of 8
    training = fit(cfg)
    loader = Loader(scenes("train"), batch_size=8, image_size=64, training=True, flip=True)
    seen = torch.cat([training.embeddings(one["image"]) for one in islice(loader, 3)])
    torch.testing.assert_close(training.decoder.mean, seen.mean(0))
    torch.testing.assert_close(training.decoder.std, seen.std(0))
    whitened = training.decoder.whiten(seen)
    torch.testing.assert_close(whitened.std(0), torch.ones(128))

    registry.save(training.decoder, tmp_path / "decoder.safetensors")
    started = fit(configuration("data.batch_size=8", f"module.decoder_weights={tmp_path}/decoder.safetensors"))
    assert torch.equal(started.decoder.mean, training.decoder.mean)  # kept, though 16 would be measured


def test_a_resumed_run_is_the_run_and_keeps_its_statistics(tmp_path):
    from zoo.commands.train import train

    options = [*SMALL, "data.batch_size=8", "schedule=constant", "schedule.warmup_steps=0", "trainer.max_steps=4"]
    options += ["trainer.limit_val_batches=0", "callbacks.best=null", "callbacks.progress=null"]
    every = "{_target_: lightning.pytorch.callbacks.ModelCheckpoint, every_n_train_steps: 2, save_top_k: -1, "
    every += f"dirpath: {tmp_path}/every, filename: '{{step}}'}}"

    def run(folder, *overrides):
        run = [*options, *overrides, f"output_dir={tmp_path}/{folder}"]
        train(cli.compose("train", ["experiment=seed-decoder-tiny", *run]))
        return load_file(tmp_path / folder / "decoder.safetensors")

    whole = run("whole", f"+callbacks.every={every}")
    (tmp_path / "ended/checkpoints").mkdir(parents=True)
    (tmp_path / "every/step=2.ckpt").rename(tmp_path / "ended/checkpoints/last.ckpt")
    resumed = run("ended", "resume=true", "module.measured_images=64")  # of which nothing is measured
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name


def test_a_training_can_start_from_a_trained_decoder(tmp_path):
    trained = make()
    registry.save(trained, tmp_path / "decoder.safetensors")
    started = module(f"module.decoder_weights={tmp_path}/decoder.safetensors").decoder
    assert started.training
    for name, tensor in trained.state_dict().items():
        assert torch.equal(started.state_dict()[name], tensor), name


def test_an_embedding_that_is_left_out_plays_no_part(batch, monkeypatch):
    for share, same in ((1.0, True), (0.0, False)):
        training = randomised(module(f"decoder.condition_dropout={share}", "module.noised_share=0.0"))
        before = loss(training, batch)
        monkeypatch.setattr(training, "embeddings", lambda images: torch.ones(len(images), 128))
        assert torch.equal(loss(training, batch), before) == same


def test_the_loss_of_validation_has_exact_embeddings(batch):
    noisy, plain = (
        randomised(module("decoder.condition_dropout=0.0", f"module.noised_share={share}")) for share in (1.0, 0.0)
    )
    assert torch.equal(loss(noisy, batch, exact=True), loss(plain, batch, exact=True))
    assert torch.equal(loss(plain, batch), loss(plain, batch, exact=True))
    assert not torch.equal(loss(noisy, batch), loss(plain, batch))
    assert not torch.equal(loss(plain, batch, seed=1), loss(plain, batch))


def test_the_loss_of_a_network_of_zeros_is_that_of_the_velocities(batch):
    training = module()
    data = zoo.load_tokenizer("kl-tiny").encode(batch["image"]).latents["image"]
    assert loss(training, batch).item() == pytest.approx(1 + data.square().mean().item(), abs=0.2)


def test_the_loss_reads_nothing_back_from_the_device(batch):
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoWaiting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert not any(name in str(function) for name in ("_local_scalar_dense", "nonzero", "_to_cpu"))
            return function(*args, **(kwargs or {}))

    training = module()
    with NoWaiting():
        training.flow_loss(batch, torch.Generator().manual_seed(0)).backward()


def test_the_condition_is_the_embedding_before_it_is_normalised(batch):
    found = module().embeddings(batch["image"])
    assert found.norm(dim=1).min() > 2
    normalised = zoo.load_encoder("siglip-tiny").encode_image(batch["image"])
    torch.testing.assert_close(torch.nn.functional.normalize(found, dim=-1), normalised)
    assert module().embeddings(torch.rand(2, 3, 96, 96)).shape == (2, 128)  # resized to what the teacher takes


def test_pictures_are_images_reconstructions_and_decoded_embeddings(batch):
    training = module().eval()
    shown = training.pictures(batch, 2)
    assert shown.shape == (6, 3, 64, 64)
    assert torch.equal(shown[:2], batch["image"][:2])
    assert torch.equal(shown[2:4], zoo.load_tokenizer("kl-tiny").reconstruct(batch["image"][:2]))
    torch.testing.assert_close(shown[4:], training.decoder.decode(training.embeddings(batch["image"][:2])))


def test_any_continuous_tokenizer_can_be_the_space(batch):
    sizes = registry.tokenizers.preset("mingtok-tiny").config
    space = f"decoder.latent_dim={sizes.latent_dim}", f"decoder.grid={sizes.image_size // sizes.patch_size}"
    training = module("tokenizer=mingtok-tiny", "decoder.tokenizer=mingtok-tiny", *space)
    assert loss(training, batch).isfinite()
    assert training.eval().pictures(batch, 1).shape == (3, 3, 64, 64)


def test_the_decoder_is_what_is_compiled():
    training = module("module.compile=true")
    training.setup("validate")
    assert training.decoder._compiled_call_impl is not None
    assert training.tokenizer._compiled_call_impl is None


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("decoder.embed_dim=64", "reads embeddings of siglip-tiny of 64 values, and the teacher siglip-tiny has 128"),
        ("module.teacher.name=siglip-tiny decoder.encoder=other", "reads embeddings of other"),
        ("decoder.grid=4", "set decoder.grid"),
        ("module.noised_share=2.0", "noised_share must be a share"),
        ("module.measured_images=1", "measured_images must be at least 2"),
    ],
)
def test_parts_that_do_not_fit_are_refused(override, complaint):
    from hydra.errors import InstantiationException

    with pytest.raises(InstantiationException) as caught:
        module(*override.split())
    assert isinstance(caught.value.__cause__, ZooError)
    assert complaint in str(caught.value.__cause__)


def test_statistics_need_a_data_module():
    import lightning as L

    training = instantiate(configuration().module, tokenizer=zoo.load_tokenizer("kl-tiny"))
    trainer = L.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ZooError, match="give the trainer a datamodule"):
        trainer.fit(training, Loader(scenes("train"), batch_size=4, training=True))


def test_the_decoder_imports_no_training_and_no_encoder():
    import subprocess
    import sys

    heavy = "lightning", "diffusers", "transformers", "timm", "hydra", "torchvision"
    code = (
        "import sys, torch, zoo; d = zoo.create_decoder('seed-tiny-decoder', width=16, num_heads=2); "
        f"d.eval().decode(torch.zeros(1, 128), num_steps=1); print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"

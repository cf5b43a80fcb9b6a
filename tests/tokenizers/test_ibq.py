"""What IBQ promises beyond the numbers of the reference."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from hydra.utils import instantiate

import zoo
from zoo import Tokens, ZooError, registry, weights
from zoo.commands import cli
from zoo.data import Loader, scenes
from zoo.losses.adversarial import PatchDiscriminator
from zoo.tokenizers.ibq import published

GAN = [
    *("module.adversarial_weight=0.1", "module.lecam_weight=0.05", "module.discriminator_width=8"),
    "+module.optimizers.discriminator=${optimizer}",
]
SMALL = ["tokenizer.channels=8", "tokenizer.norm_groups=4", "tokenizer.codebook_size=64"]
SGD = ["optimizer._target_=torch.optim.SGD", "~optimizer.betas", "optimizer.lr=1e-2", "schedule.warmup_steps=0"]
EXACT = "callbacks.ema.decay=0.0"  # an average of equal weights is rounded


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return zoo.create_tokenizer("ibq-tiny", channels=8, norm_groups=4, codebook_size=64).eval()


def images(height=64, width=64, count=2):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(3))


def module(*overrides, experiment="ibq-tiny"):
    torch.manual_seed(0)
    cfg = cli.compose("train", [f"experiment={experiment}", *SMALL, *overrides])
    made = instantiate(cfg.module, tokenizer=instantiate(cfg.tokenizer))
    made.kept = SimpleNamespace(global_step=0)
    made._trainer = made.kept  # all that a loss asks of a trainer
    return made


@pytest.mark.parametrize(("height", "width"), [(64, 64), (8, 40), (24, 16)])
def test_any_multiple_of_the_patch_is_encoded_and_decoded(tokenizer, height, width):
    tokens = tokenizer.encode(images(height, width))
    assert tokens.grid == (height // 8, width // 8)
    assert tokens.ids["image"].shape == (2, height * width // 64)
    assert tokenizer.decode(tokens).shape == (2, 3, height, width)


def test_published_sizes_take_multiples_of_16_and_have_the_published_numbers_of_tokens():
    with torch.device("meta"):
        small, large = (zoo.create_tokenizer(name) for name in ("ibq-262144", "ett-131072"))
    assert (small.info.max_tokens, large.info.max_tokens, small.info.size_multiple) == (256, 1024, 16)
    shapes = [{name: p.shape for name, p in one.named_parameters() if "codebook" not in name} for one in (small, large)]
    assert shapes[0] == shapes[1]
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in small.named_children()}
    assert (count["encoder"], count["decoder"], count["quant_conv"]) == (46_752_256, 59_903_875, 65_792)
    assert registry.preset("ett-131072").weights is None


def test_a_batch_equals_its_images_one_by_one(tokenizer):
    tokens = tokenizer.encode(images(count=4))
    decoded = tokenizer.decode(tokens)
    for i, image in enumerate(images(count=4)):
        alone = tokenizer.encode(image[None])
        assert torch.equal(alone.ids["image"], tokens[i].ids["image"])
        torch.testing.assert_close(tokenizer.decode(alone), decoded[i : i + 1], rtol=1e-4, atol=1e-5)


def test_the_forward_decodes_what_the_ids_stand_for(tokenizer):
    values = tokenizer.config.to_values(images())
    with torch.no_grad():
        reconstruction, quantized = tokenizer(values)
    tokens = tokenizer.encode(images())
    assert torch.equal(quantized.ids.flatten(1), tokens.ids["image"])
    decoded = tokenizer.decode(Tokens({"image": quantized.ids.flatten(1)}, grid=(8, 8)))
    torch.testing.assert_close(tokenizer.config.to_images(reconstruction).clamp(0, 1), decoded)
    assert torch.equal(tokenizer.embed(tokens), quantized.quantized.flatten(1, 2))


def test_a_loss_on_the_codes_alone_reaches_every_code_and_the_first_layer():
    made = module()
    values = made.values(images())
    codes = made.regularized(values).codes
    assert codes.shape == (2, 64, 32)
    (codes * torch.randn(codes.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    assert made.tokenizer.quantizer.codebook.grad.abs().sum(1).gt(0).all()
    assert made.tokenizer.encoder.conv_in.weight.grad.ne(0).any()
    assert made.tokenizer.decoder.conv_out.weight.grad is None


def theirs(tokenizer, shift=0.0):
    """A file of the authors: averages are the weights, and the last weights are those plus a shift."""
    state = published.to_published(tokenizer.state_dict(), tokenizer.config)
    losses = {f"loss.discriminator.{n}": t for n, t in PatchDiscriminator(width=8).state_dict().items()}
    trained = state | {name: tensor for name, tensor in losses.items() if tensor.is_floating_point()}
    averages = {average: trained[name] for name, average in published.averaged_names(trained).items()}
    counters = {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(-1, dtype=torch.int32)}
    return {name: tensor + shift for name, tensor in state.items()} | losses | averages | counters


SIZES = {"channels": 8, "norm_groups": 4, "codebook_size": 64}


def test_averages_are_loaded_from_names_without_dots(tokenizer, tmp_path):
    path = tmp_path / "ibq.ckpt"
    torch.save({"state_dict": theirs(tokenizer, shift=1.0), "pytorch-lightning_version": "2.2.0"}, path)
    loaded = zoo.load_tokenizer("ibq-tiny", weights=path, **SIZES)
    for name, tensor in tokenizer.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert "model_ema.encoderdown0block0norm1weight" in theirs(tokenizer)


def test_without_averages_the_last_weights_are_loaded_and_that_is_said(tokenizer, tmp_path):
    path = tmp_path / "ibq.ckpt"
    state = {name: tensor for name, tensor in theirs(tokenizer).items() if not name.startswith("model_ema.")}
    torch.save({"state_dict": state}, path)
    with pytest.warns(UserWarning, match="no averages of weights"):
        loaded = zoo.load_tokenizer("ibq-tiny", weights=path, **SIZES)
    assert torch.equal(loaded.quantizer.codebook, tokenizer.quantizer.codebook)


@pytest.mark.parametrize(
    ("removed", "complaint"),
    [
        ("model_ema.quant_convbias", "averages of weights, but none of 1, quant_conv.bias among them"),
        ("decoder.conv_in.bias", r"1 missing \(decoder.conv_in.bias\); nothing was loaded"),
    ],
)
def test_an_incomplete_file_is_refused(tokenizer, tmp_path, removed, complaint):
    path, state = tmp_path / "ibq.ckpt", theirs(tokenizer)
    state.pop(removed)
    torch.save(state, path)
    with pytest.raises(ZooError, match=complaint):
        zoo.load_tokenizer("ibq-tiny", weights=path, **SIZES)


def test_a_codebook_of_another_size_is_refused_in_one_sentence(tokenizer, tmp_path):
    torch.save(theirs(tokenizer), tmp_path / "ibq.ckpt")
    with pytest.raises(ZooError, match=r"with 64 codes, and the configuration has 1024; load it under a name"):
        zoo.load_tokenizer("ibq-tiny", weights=tmp_path / "ibq.ckpt", channels=8, norm_groups=4)
    zoo.registry.save_tokenizer(tokenizer, tmp_path / "ours.safetensors")
    assert zoo.load_tokenizer("ibq-tiny", weights=tmp_path / "ours.safetensors").config.codebook_size == 64
    with pytest.raises(ZooError, match=r"quantizer.codebook \(64, 32\) instead of \(32, 32\)"):
        zoo.load_tokenizer("ibq-tiny", weights=tmp_path / "ours.safetensors", codebook_size=32)


def test_weights_are_on_the_hub_of_the_authors():
    where = {name: registry.preset(name).weights.location for name in zoo.list_tokenizers("ibq-*[0-9n]")}
    assert where["ibq-16384"] == "hf://TencentARC/IBQ-Tokenizer-16384/imagenet256_16384.ckpt"
    assert where["ibq-262144-pretrain"] == "hf://TencentARC/IBQ-Tokenizer-262144-Pretrain/IBQ_pretrain_262144.ckpt"
    assert len(where) == 6


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"codebook_size": 0}, "IBQConfig.codebook_size must be at least 1, got 0"),
        ({"z_channels": -1}, "IBQConfig.z_channels must be at least 1, got -1"),
        ({"entropy_temperature": -0.5}, "temperature must be above 0, or 0 for no entropies, got -0.5"),
    ],
)
def test_sizes_that_cannot_be_are_refused(options, complaint):
    with pytest.raises(ZooError, match=complaint):
        zoo.create_tokenizer("ibq-tiny", **options)


def test_the_loss_is_what_the_recipe_says():
    made = module("module.loss=l1", "module.quantizer_weight=0.5")
    ((name, loss, logs),) = made.losses({"image": images()})
    values = 2 * images() - 1
    reconstruction, quantized = made.tokenizer(values)
    expected = (reconstruction - values).abs().mean() + 0.5 * quantized.loss + 0.02 * quantized.entropy
    assert name == "tokenizer"
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logs["entropy"], logs["sample_entropy"] - logs["average_entropy"])


def test_the_discriminator_steps_first_and_its_running_means_move_in_training_alone():
    made = module(*GAN)
    before = made.lecam.real.clone(), made.lecam.fake.clone()
    steps = {name: logs for name, _, logs in made.losses({"image": images()})}
    assert list(steps) == ["discriminator", "tokenizer"]
    assert {"lecam", "logits_real"} <= steps["discriminator"].keys()
    assert steps["tokenizer"]["adversarial_weight"] == pytest.approx(0.1)
    torch.testing.assert_close(made.lecam.real - before[0], 0.001 * steps["discriminator"]["logits_real"])
    assert {"lecam.real", "lecam.fake"} <= made.state_dict().keys()
    moved = made.lecam.real.clone()
    made.eval()
    made.discriminator_loss(made.values(images()), images())
    assert torch.equal(made.lecam.real, moved)


def test_an_adaptive_weight_follows_the_gradients_of_the_last_layer():
    made = module(*GAN, "module.adaptive=true")
    logs = {name: logs for name, _, logs in made.losses({"image": images()})}["tokenizer"]
    assert logs["adversarial_weight"] != pytest.approx(0.1)


def test_a_discriminator_goes_on_from_a_checkpoint_of_the_authors_or_of_the_zoo(tokenizer, tmp_path):
    state = theirs(tokenizer)
    torch.save({"state_dict": state}, tmp_path / "theirs.ckpt")
    made = module(*GAN, f"module.discriminator_weights={tmp_path}/theirs.ckpt")
    for name, tensor in made.discriminator.state_dict().items():
        assert torch.equal(tensor, state[f"loss.discriminator.{name}"])
    content = {"state_dict": made.state_dict(), "pytorch-lightning_version": L.__version__}
    torch.save(content, tmp_path / "ours.ckpt")
    again = module(*GAN, f"module.discriminator_weights={tmp_path}/ours.ckpt")
    assert torch.equal(again.discriminator.main[0].weight, made.discriminator.main[0].weight)
    assert weights.read(tmp_path / "ours.ckpt")[0].keys() == made.tokenizer.state_dict().keys()


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["module.adversarial=saturating"], "no adversarial loss is called 'saturating'; did you mean non_saturating"),
        (["module.discriminator_weights=some.ckpt"], "discriminator_weights needs an adversarial_weight above 0"),
    ],
)
def test_what_does_not_fit_is_said_in_one_sentence(overrides, complaint):
    with pytest.raises(Exception, match=complaint):
        module(*overrides)


def test_two_ranks_train_as_one(tmp_path, train_on):
    options = [EXACT, *SMALL, *SGD, *GAN]
    one, two = (train_on(n, tmp_path / str(n), "ibq-tiny", *options) for n in (1, 2))
    names = "gradient_norm/tokenizer", "gradient_norm/discriminator", "average_entropy", "perplexity/image"
    for name in names:
        assert two[f"train/{name}"] == pytest.approx(one[f"train/{name}"], rel=1e-3), name
    first, second = (zoo.load_tokenizer("ibq-tiny", tmp_path / n / "tokenizer.safetensors") for n in ("1", "2"))
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


def test_the_published_recipe_is_that_of_the_authors():
    cfg = cli.compose("train", ["experiment=ibq", "data.path=imagenet"])
    assert (cfg.optimizer.lr, list(cfg.optimizer.betas), cfg.callbacks.ema.decay) == (1e-4, [0.5, 0.9], 0.999)
    assert cfg.data.batch_size * cfg.trainer.devices * cfg.trainer.num_nodes == 256
    factors = {"perceptual_weight": 1, "adversarial_weight": 0.1, "entropy_weight": 0.05, "lecam_weight": 0.05}
    assert factors.items() <= dict(cfg.module).items()
    rate = instantiate(cfg.schedule)
    assert [rate(epoch * 10, -1, 10) for epoch in (0, 249, 250, 300)] == pytest.approx([1, 1, 0.1, 0.01])
    pretraining = cli.compose("train", ["experiment=ibq-pretrain", "tokenizer=ett-131072", "data.image_size=256"])
    assert instantiate(pretraining.schedule)(10**6, 1_500_000, -1) == 1
    assert pretraining.data.batch_size * pretraining.trainer.devices * pretraining.trainer.num_nodes == 256


def test_the_small_recipe_lowers_the_loss_and_uses_its_codes(tmp_path, zoo_command):
    options = [*SMALL, "trainer.max_steps=40", "data.batch_size=8", "trainer.limit_val_batches=2"]
    options += ["schedule.warmup_steps=5", "callbacks.ema.decay=0.8"]
    zoo_command("train", "experiment=ibq-tiny", *options, f"output_dir={tmp_path}")
    tokenizer = zoo.load_tokenizer("ibq-tiny", weights=tmp_path / "tokenizer.safetensors")
    batch = next(iter(Loader(scenes("val"), batch_size=16, fields=["image"])))["image"]
    untrained = zoo.create_tokenizer("ibq-tiny", **SIZES).eval()
    errors = [(one.reconstruct(batch) - batch).square().mean() for one in (tokenizer, untrained)]
    assert errors[0] < 0.7 * errors[1]
    assert len(tokenizer.encode(batch).ids["image"].unique()) > 5

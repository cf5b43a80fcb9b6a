"""How a tokenizer is tuned by captions, and what the stages around that move."""

import json
from types import SimpleNamespace

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate

import zoo
from zoo import ZooError, registry
from zoo.commands import cli
from zoo.data import Loader, read_all, scenes
from zoo.lm import EmbeddingConfig, VisualLM
from zoo.lm.judge import resized
from zoo.lm.text import train_text_tokenizer
from zoo.tokenizers.ett.report import COLUMNS, found_runs, report, summary

CODES = 48
SMALL = ["tokenizer.image_size=32", f"tokenizer.codebook_size={CODES}"]
LM = [
    *("module.lm.hidden_size=32", "module.lm.num_hidden_layers=1", "module.lm.intermediate_size=32"),
    *("module.lm.num_attention_heads=2", "module.lm.num_key_value_heads=2", "module.text_tokenizer.vocab_size=300"),
]
SGD = ["optimizer._target_=torch.optim.SGD", "~optimizer.betas", "optimizer.lr=1e-2", "schedule.warmup_steps=0"]
OWN = ["loss", "quantizer_weight", "entropy_weight", "adversarial_weight"]
"""What the recipe of IBQ is told."""
PLAIN_ADAM = ["optimizer.weight_decay=0"]  # so that what has no gradient stays


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ett")


@pytest.fixture(scope="module")
def start(folder, train_on):
    """The model of stage 1 on random weights; what it began with is beside it."""
    torch.manual_seed(0)
    tokenizer = zoo.create_tokenizer("ibq-tiny", image_size=32, codebook_size=CODES)
    registry.save(tokenizer, folder / "start.safetensors")
    weights = f"module.tokenizer_weights={folder}/start.safetensors"
    train_on(1, folder / "1", "ett-tiny-alignment", *SMALL, *LM, weights, *PLAIN_ADAM)
    return folder / "1/model"


@pytest.fixture(scope="module")
def batch():
    return next(iter(Loader(scenes("val"), batch_size=4, image_size=32, fields=["image", "caption"])))


def tuning(start, *overrides):
    torch.manual_seed(0)
    cfg = cli.compose("train", ["experiment=ett-tiny", *SMALL, f"module.start={start}", *overrides])
    made = instantiate(cfg.module, tokenizer=instantiate(cfg.tokenizer))
    for module in (made, made.autoencoder):  # all that a loss asks of a trainer
        module._trainer = SimpleNamespace(world_size=1, global_rank=0, global_step=0)
    return made


def moved(before, after):
    """Parts of a VisualLM of which some tensor differs."""
    one, two = (model.state_dict() for model in (before, after))
    parts = ("lm", "vision.projector", "vision.visual_head", "vision.tokenizer.encoder", "vision.tokenizer.decoder")
    parts += ("vision.tokenizer.quantizer",)
    changed = {name for name in one.keys() & two.keys() if not torch.equal(one[name], two[name])}
    return {part.split(".")[-1] for part in parts if any(name.startswith(f"{part}.") for name in changed)}


def test_captions_alone_reach_the_encoder_and_every_code(start, batch):
    training = tuning(start, "module.alpha=0")
    ((name, loss, logs),) = training.losses(batch)
    loss.backward()
    tokenizer = training.tokenizer
    assert name == "model"
    assert logs["text_loss"].item() == pytest.approx(loss.item())
    assert tokenizer.encoder.conv_in.weight.grad.abs().max() > 0
    assert (tokenizer.quantizer.codebook.grad.abs().sum(1) > 0).all()
    assert all(parameter.grad is None for parameter in tokenizer.decoder.parameters())


def test_the_loss_is_that_of_captions_and_alpha_times_the_tokenizer_s_own(start, batch):
    captions, own = tuning(start, "module.alpha=0"), tuning(start).autoencoder
    ((_, caption, _),) = captions.losses(batch)
    ((_, vq, _),) = own.losses(batch)
    for alpha in (0.25, 1.0):
        ((_, loss, logs),) = tuning(start, f"module.alpha={alpha}").losses(batch)
        assert loss.item() == pytest.approx(caption.item() + alpha * vq.item(), rel=1e-6)
        assert logs["tokenizer/loss"].item() == pytest.approx(vq.item(), rel=1e-6)


def test_a_discriminator_goes_on_learning(start, batch):
    gan = ["module.autoencoder.adversarial_weight=0.1", "+module.optimizers.discriminator=${optimizer}"]
    training = tuning(start, *gan)
    assert list(training.optimized()) == ["model", "discriminator"]
    assert [name for name, *_ in training.losses(batch)] == ["discriminator", "model"]
    assert list(tuning(start, *gan, "module.alpha=0").optimized()) == ["model"]


def test_every_stage_moves_its_parts(folder, start, train_on):
    go_on = [*SMALL, f"module.start={start}", *PLAIN_ADAM]
    train_on(1, folder / "2", "ett-tiny", *go_on)
    train_on(1, folder / "aligned", "ett-tiny-alignment", *go_on, "module.train_lm=false")
    train_on(1, folder / "captions", "ett-tiny-alignment", *go_on)
    writes = ["module.embeddings.visual_head=true", "module.image_share=1.0"]
    train_on(1, folder / "gen", "ett-tiny-alignment", *go_on, *writes)
    model = VisualLM.load(start)
    after = {name: VisualLM.load(folder / name / "model") for name in ("2", "aligned", "captions", "gen")}
    assert {name: moved(model, one) for name, one in after.items()} == {
        "2": {"lm", "projector", "encoder", "quantizer", "decoder"},
        "aligned": {"projector"},
        "captions": {"lm", "projector"},
        "gen": {"lm", "projector"},
    }
    assert after["gen"].vision.config.visual_head
    tuned = zoo.load_tokenizer("ibq-tiny", weights=folder / "2/tokenizer.safetensors")
    for name, tensor in after["2"].vision.tokenizer.state_dict().items():
        assert torch.equal(tuned.state_dict()[name], tensor)


def test_two_ranks_train_as_one(folder, start, train_on):
    options = [*SMALL, f"module.start={start}", *SGD]
    one, two = (train_on(ranks, folder / f"ranks-{ranks}", "ett-tiny", *options) for ranks in (1, 2))
    for name in ("text_loss", "gradient_norm/model"):
        assert two[f"train/{name}"] == pytest.approx(one[f"train/{name}"], rel=1e-4), name
    assert {"val/text_loss", "val/psnr"} <= two.keys()
    states = [VisualLM.load(folder / f"ranks-{ranks}/model").state_dict() for ranks in (1, 2)]
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vqgan-tiny", "dualtoken-tiny"])
def test_another_tokenizer_is_tuned_by_configuration(tmp_path, batch, name):
    model = VisualLM.create(
        instantiate(cli.compose("train", ["experiment=ett-tiny-alignment", *LM]).module.lm),
        train_text_tokenizer(batch["caption"], 300),
        zoo.load_tokenizer(name),
        embeddings=EmbeddingConfig(),
    )
    model.save(tmp_path)
    options = {
        "vqgan-tiny": [
            "experiment=ett-tiny",
            "module.autoencoder._target_=zoo.tokenizers.vqgan.training.VQGANTraining",
            *(f"~module.autoencoder.{name}_weight" for name in ("quantizer", "entropy")),
        ],
        "dualtoken-tiny": ["experiment=ett-tiny-dualtoken"],
    }[name]
    cfg = cli.compose("train", [*options, f"tokenizer={name}", f"module.start={tmp_path}", "module.alpha=0"])
    training = instantiate(cfg.module, tokenizer=instantiate(cfg.tokenizer))
    training._trainer = training.autoencoder._trainer = SimpleNamespace(world_size=1, global_rank=0, global_step=0)
    images = next(iter(Loader(scenes("val"), batch_size=4, fields=["image", "caption"])))
    ((_, loss, _),) = training.losses(images)
    loss.backward()
    first = next(parameter for parameter in training.tokenizer.parameters() if parameter.requires_grad)
    assert first.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["module.alpha=-1"], "alpha must be at least 0"),
        (["module.image_share=0.5"], "image_share must be 0"),
        (["module.start=null"], "goes on from an earlier one; set module.start"),
        (["module.embeddings.visual_head=false", "module.embeddings.marks=true"], "reads images with embeddings"),
        (["tokenizer.codebook_size=50"], "choose its tokenizer"),
        (
            [
                "module.autoencoder._target_=zoo.training.module.TrainingModule",
                *(
                    f"~module.autoencoder.{n}"
                    for n in ("loss", "quantizer_weight", "entropy_weight", "adversarial_weight")
                ),
            ],
            "autoencoder must be an AutoencoderTraining, got TrainingModule",
        ),
    ],
)
def test_wrong_settings_are_refused(start, overrides, complaint):
    with pytest.raises((InstantiationException, ZooError), match=complaint):
        tuning(start, *overrides)


def test_the_published_stages_have_the_published_numbers():
    stages = {
        name: cli.compose("train", [f"experiment={name}"]) for name in ("ett-alignment", "ett", "ett-chat", "ett-gen")
    }
    assert [cfg.optimizer.lr for cfg in stages.values()] == [4e-5, 4e-5, 2e-5, 2e-5]
    assert [cfg.trainer.max_steps for cfg in stages.values()] == [11719, 11719, 65723, 29297]
    assert [cfg.module.train_lm for cfg in stages.values()] == [False, True, True, True]
    assert stages["ett"].module.alpha == 0.25
    assert stages["ett-gen"].module.embeddings.visual_head
    assert (stages["ett"].tokenizer.codebook_size, stages["ett"].tokenizer.image_size) == (131072, 512)


# The report


def test_runs_are_found_by_seed_and_variant(tmp_path):
    for seed in "01":
        for variant in ("alpha-0.25", "frozen", "ids"):
            (tmp_path / seed / variant / "model").mkdir(parents=True)
    assert {name: len(paths) for name, paths in found_runs(tmp_path).items()} == {
        "ids": 2,
        "frozen": 2,
        "alpha-0.25": 2,
    }
    (tmp_path / "1/ids/model").rmdir()
    with pytest.raises(ZooError, match="lacks 1/ids"):
        found_runs(tmp_path)
    with pytest.raises(ZooError, match="holds no runs"):
        found_runs(tmp_path / "0")


def test_a_summary_has_means_and_deviations():
    rows = [dict.fromkeys(COLUMNS, 1.0), dict.fromkeys(COLUMNS, 3.0)]
    assert summary({"frozen": rows})["frozen"]["psnr"] == (2.0, pytest.approx(2**0.5))
    assert summary({"frozen": rows[:1]})["frozen"]["loss"] == (1.0, 0.0)


def test_runs_are_measured(folder, start, tmp_path, monkeypatch, capsys):
    few = lambda source, fields: {name: rows[:6] for name, rows in read_all(source, fields).items()}  # noqa: E731
    monkeypatch.setattr("zoo.tokenizers.ett.report.read_all", few)
    (tmp_path / "0/frozen").mkdir(parents=True)
    (tmp_path / "0/frozen/model").symlink_to(start)
    found = report(tmp_path, tmp_path / "report")
    row, model = found["runs"]["frozen"][0], VisualLM.load(start)
    val = few(scenes("val"), ["image", "caption"])
    images = resized(val["image"], 32)
    never = torch.zeros(6, dtype=torch.bool)
    assert row["loss"] == pytest.approx(model(val["caption"], images, never, never)[0].mean().item(), rel=1e-4)
    tokenizer = model.vision.tokenizer
    mse = (tokenizer.reconstruct(images) - images).square().flatten(1).mean(1)
    assert row["psnr"] == pytest.approx((-10 * mse.log10()).mean().item(), rel=1e-4)
    ids = tokenizer.encode(images).ids["image"]
    assert row["usage"] == pytest.approx(len(ids.unique()) / CODES)
    assert json.loads((tmp_path / "report/report.json").read_text())["scenes"] == 6
    assert (tmp_path / "report/comparison.png").is_file()
    assert "caption loss, nats a word" in capsys.readouterr().out

"""How a visual language model of ids is trained."""

from types import SimpleNamespace

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lm_helpers import CODE_TOKENIZERS, code_tokenizer

from zoo import registry
from zoo.commands import cli
from zoo.data import Loader, scenes
from zoo.lm import VisualLM
from zoo.tokenizers.seed.language import seed_streams

NAME, TOKENIZER = CODE_TOKENIZERS["plain"]
SMALL = [
    f"tokenizer={NAME}",
    *(f"tokenizer.{name}={value}" for name, value in TOKENIZER.items()),
    *("module.lm.hidden_size=32", "module.lm.num_hidden_layers=1", "module.lm.intermediate_size=32"),
    *("module.lm.num_attention_heads=2", "module.lm.num_key_value_heads=2", "module.text_tokenizer.vocab_size=300"),
]
CODES = 4
"""Of an image."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tokenizer.safetensors"
    registry.save(code_tokenizer(), path)
    return f"module.tokenizer_weights={path}"


@pytest.fixture(scope="module")
def make(weights):
    def module(*overrides):
        torch.manual_seed(0)
        cfg = cli.compose("train", ["experiment=seed-lm-tiny", *SMALL, weights, *overrides])
        made = instantiate(cfg.module, tokenizer=instantiate(cfg.tokenizer))
        # all that a loss asks of a trainer
        loop = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=0))
        made._trainer = SimpleNamespace(world_size=1, global_rank=0, fit_loop=loop)
        return made

    return module


@pytest.fixture(scope="module")
def batch():
    return next(iter(Loader(scenes("val"), batch_size=6, image_size=16, fields=["image", "caption"])))


def test_two_ranks_train_as_one(tmp_path, train_on, weights):
    # the one mean of all words; test_training.py has the two means
    sgd = ("optimizer._target_=torch.optim.SGD", "~optimizer.betas", "optimizer.lr=1e-2", "schedule.warmup_steps=0")
    options = ("trainer.strategy=ddp", "module.all_words=true")  # every parameter has a part in every batch
    one, two = (train_on(n, tmp_path / str(n), "seed-lm-tiny", *SMALL, weights, *sgd, *options) for n in (1, 2))
    for name in ("text_loss", "code_loss", "loss", "gradient_norm/model"):
        assert two[f"train/{name}"] == pytest.approx(one[f"train/{name}"], rel=1e-4)
    assert {"val/text_loss", "val/code_loss", "val/loss"} <= one.keys()
    states = [VisualLM.load(tmp_path / f"{n}/model").state_dict() for n in (1, 2)]
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-4, atol=1e-6)
    assert (tmp_path / "1/pictures/step-0000004.png").is_file()


def test_both_losses_fall_on_two_samples(make, batch):
    training = make()
    pair = {"image": batch["image"][:2], "caption": [text[:30] for text in batch["caption"][:2]]}
    optimizer = torch.optim.AdamW(training.model.parameters(), lr=3e-3)
    to_image, never = torch.tensor([True, False]), torch.tensor([False, False])
    history = []
    for _ in range(80):
        text, codes = training.pair_losses(pair, to_image, never, torch.Generator())
        optimizer.zero_grad()
        (text.mean() + codes.mean()).backward()
        optimizer.step()
        history.append((text.mean().item(), codes.mean().item()))
    for first, last in zip(history[0], history[-1], strict=True):
        assert last < 0.2 * first


def test_the_loss_weighs_the_means_over_words_and_codes(make, batch):
    training = make("module.text_weight=2.0", "module.code_weight=3.0")
    ((_, loss, logs),) = training.losses(batch)
    assert loss.item() == pytest.approx(2 * logs["text_loss"].item() + 3 * logs["code_loss"].item())
    assert logs["loss"].item() == pytest.approx(loss.item())


def test_the_loss_of_all_words_is_their_one_mean(make, batch, monkeypatch):
    training, seen = make("module.all_words=true", "module.condition_dropout=0.0"), []
    forward = training.model.forward
    record = lambda *inputs, **settings: seen.append(forward(*inputs, **settings)) or seen[-1]  # noqa: E731
    monkeypatch.setattr(training.model, "forward", record)
    ((_, loss, logs),) = training.losses(batch)
    assert loss.item() == pytest.approx(torch.cat(seen[0]).mean().item())
    assert logs["loss"].item() == pytest.approx(loss.item())
    texts = sum(len(training.model.text_ids(caption)) + 1 for caption in batch["caption"])
    assert len(seen[0][0]) == texts - 3  # no word comes before the first of a caption in front
    assert len(seen[0][1]) == 6 * (CODES + 2) - 3


@pytest.mark.parametrize(("share", "images"), [(0.5, 3), (0.0, 0), (1.0, 6)])
def test_a_share_of_the_batch_becomes_images(make, batch, monkeypatch, share, images):
    training, seen = make(f"module.image_share={share}"), []
    forward = training.model.forward
    monkeypatch.setattr(training.model, "forward", lambda *inputs: seen.append(forward(*inputs)) or seen[-1])
    ((_, loss, _),) = training.losses(batch)
    ((text, codes),) = seen
    assert len(codes) == CODES * images
    assert (len(text) > 0) == (images < 6)
    assert loss.isfinite()


def test_validation_is_without_dropout_and_of_what_is_learned_by_default(make, batch, monkeypatch):
    logged = []
    for overrides in (["module.condition_dropout=1.0"], ["module.all_words=true"]):
        training = make(*overrides)
        monkeypatch.setattr(training, "log", lambda name, value, **_: logged.append((name, value.item())))
        with torch.no_grad():
            training.validation_step(batch, 0)
    assert logged[:3] == logged[3:]
    assert [name for name, _ in logged[:3]] == ["val/text_loss", "val/code_loss", "val/loss"]


def test_pictures_show_the_first_images_and_what_their_captions_give(make, batch):
    shown = make().pictures(batch, 2)
    assert shown.shape == (4, 3, 16, 16)
    assert torch.equal(shown[:2], batch["image"][:2])


def test_a_model_that_only_reads_shows_images_alone(make, batch):
    training = make()
    training.model.vision.obstacle = "a reason"
    assert torch.equal(training.pictures(batch, 2), batch["image"][:2])


def test_the_large_experiment_has_the_published_words_and_settings():
    cfg = cli.compose("train", ["experiment=seed-lm", f"tokenizer={NAME}", "data.train=x.tar"])
    assert instantiate(cfg.module.streams) == seed_streams()
    assert (cfg.module.all_words, cfg.module.bos, cfg.module.condition_dropout) == (True, True, 0.0)
    assert cfg.schedule.warmup_steps == 0.03 * cfg.trainer.max_steps


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["module.streams=[pixel]"], "vqgan-tiny has no stream 'pixel'; there are: image"),
        (["module.num_tokens=3"], "num_tokens is for tokenizers of variable length"),
        (["module.image_share=2.0"], "image_share must be a share from 0 to 1, got 2"),
        (["+module.bos=true"], "no bos_token to begin with"),
    ],
)
def test_wrong_settings_are_refused(make, overrides, complaint):
    with pytest.raises(InstantiationException, match=complaint):
        make(*overrides)

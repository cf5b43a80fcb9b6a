"""How a visual language model is trained."""

from types import SimpleNamespace

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lm_helpers import TOKENIZER, N

import zoo
from zoo import ZooError, registry
from zoo.commands import cli
from zoo.data import Loader, scenes
from zoo.lm import VisualLM
from zoo.tokenizers.mingtok.head import FlowHeadConfig

SMALL = [
    *(f"tokenizer.{name}={value}" for name, value in TOKENIZER.items()),
    *("module.lm.hidden_size=32", "module.lm.num_hidden_layers=1", "module.lm.intermediate_size=32"),
    *("module.lm.num_attention_heads=2", "module.lm.num_key_value_heads=2", "module.text_tokenizer.vocab_size=300"),
    *("module.head.condition_dim=32", "module.head.width=32", "module.head.depth=1"),
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = zoo.create_tokenizer("mingtok-tiny", **TOKENIZER)
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            parameter.mul_(5)  # so that images differ
    path = tmp_path_factory.mktemp("weights") / "mingtok.safetensors"
    registry.save(tokenizer, path)
    return f"module.tokenizer_weights={path}"


@pytest.fixture(scope="module")
def make(weights):
    def module(*overrides):
        torch.manual_seed(0)
        cfg = cli.compose("train", ["experiment=mingtok-lm-tiny", *SMALL, weights, *overrides])
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
    sgd = ("optimizer._target_=torch.optim.SGD", "~optimizer.betas", "optimizer.lr=1e-2", "schedule.warmup_steps=0")
    ddp = "trainer.strategy=ddp"  # every parameter has a part in every batch
    one, two = (train_on(n, tmp_path / str(n), "mingtok-lm-tiny", *SMALL, weights, *sgd, ddp) for n in (1, 2))
    for name in ("text_loss", "flow_loss", "loss", "gradient_norm/model"):
        assert two[f"train/{name}"] == pytest.approx(one[f"train/{name}"], rel=1e-4)
    assert {"val/text_loss", "val/flow_loss", "val/loss"} <= one.keys()
    states = [VisualLM.load(tmp_path / f"{n}/model").state_dict() for n in (1, 2)]
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-4, atol=1e-6)
    assert (tmp_path / "1/pictures/step-0000004.png").is_file()


def test_both_losses_fall_on_two_samples(make, batch):
    training = make("module.head.width=64")
    pair = {"image": batch["image"][:2], "caption": [text[:30] for text in batch["caption"][:2]]}
    optimizer = torch.optim.AdamW(training.model.parameters(), lr=3e-3)
    to_image, never = torch.tensor([True, False]), torch.tensor([False, False])
    history = []
    for step in range(80):
        draws = torch.Generator().manual_seed(step % 4)
        text, flow = training.pair_losses(pair, to_image, never, draws)
        optimizer.zero_grad()
        (text.mean() + flow.mean()).backward()
        optimizer.step()
        history.append((text.mean().item(), flow.mean().item()))
    texts, flows = zip(*history, strict=True)
    assert texts[-1] < 0.2 * texts[0]
    assert sum(flows[-4:]) < 0.5 * sum(flows[:4])


def test_the_loss_weighs_the_means_over_words_and_latents(make, batch):
    training = make("module.text_weight=2.0", "module.flow_weight=3.0")
    ((_, loss, logs),) = training.losses(batch)
    assert loss.item() == pytest.approx(2 * logs["text_loss"].item() + 3 * logs["flow_loss"].item())
    assert logs["loss"].item() == pytest.approx(loss.item())


@pytest.mark.parametrize(("share", "images"), [(0.5, 3), (0.0, 0), (1.0, 6), (0.2, 1)])
def test_a_share_of_the_batch_becomes_images(make, batch, monkeypatch, share, images):
    training = make(f"module.image_share={share}")
    seen = []
    forward = training.model.forward
    monkeypatch.setattr(training.model, "forward", lambda *inputs: seen.append(forward(*inputs)) or seen[-1])
    ((_, loss, _),) = training.losses(batch)
    ((text, flow),) = seen
    assert len(flow) == N * images
    assert (len(text) > 0) == (images < 6)
    assert loss.isfinite()


def test_captions_are_dropped_in_training_and_never_in_validation(make, batch, monkeypatch):
    training = make("module.condition_dropout=1.0", "module.image_share=1.0")
    for parameter in training.model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))  # a fresh flow head hears no condition
    others = batch | {"caption": [f"{text} {text}" for text in batch["caption"]]}
    ((_, dropped, _),) = training.losses(batch)
    ((_, changed, _),) = training.losses(others)
    assert dropped == changed
    logged = []
    monkeypatch.setattr(training, "log", lambda name, value, **_: logged.append((name, value.item())))
    for one in (batch, batch, others):
        with torch.no_grad():
            training.validation_step(one, 0)
    first, again, other = (dict(logged[i : i + 3]) for i in (0, 3, 6))
    assert first == again
    assert first.keys() == {"val/text_loss", "val/flow_loss", "val/loss"}
    assert first["val/flow_loss"] != other["val/flow_loss"]


def test_the_tokenizer_stays_in_evaluation_mode(make):
    training = make().train()
    assert training.tokenizer is training.model.vision.tokenizer
    assert not training.tokenizer.training
    assert training.model.lm.training


def test_pictures_show_the_first_images_and_what_their_captions_give(make, batch):
    shown = make().pictures(batch, 2)
    assert shown.shape == (4, 3, 16, 16)
    assert torch.equal(shown[:2], batch["image"][:2])
    assert not torch.allclose(shown[2], shown[3])


def test_the_large_experiment_has_the_published_head():
    cfg = cli.compose("train", ["experiment=mingtok-lm", "data.train=x.tar"])
    head = instantiate(cfg.module.head)
    assert head == FlowHeadConfig(hidden_size=1536)
    assert cfg.module.text_tokenizer == cfg.module.lm


def test_wrong_settings_are_refused(make, batch):
    with pytest.raises(InstantiationException, match="image_share must be a share from 0 to 1, got 2"):
        make("module.image_share=2.0")
    with pytest.raises(ZooError, match=r"no field 'caption'; add it to data.fields"):
        make().pair_losses({"image": batch["image"]}, None, None, None)

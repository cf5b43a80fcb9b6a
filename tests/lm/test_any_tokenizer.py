"""One recipe for a language model on any tokenizer, of ids or of latents."""

from types import SimpleNamespace

import pytest
import torch
from hydra.utils import instantiate
from lm_helpers import (
    CAPTIONS,
    CODE_SIZES,
    HEAD,
    generators,
    language_model,
    make_codes,
    pictures,
    text_words,
)

import zoo
from zoo import ZooError
from zoo.commands import cli
from zoo.commands.pretokenize import main as pretokenize
from zoo.commands.train import main as train
from zoo.data import Loader, TokenDataset, scenes
from zoo.lm import VisualLM, generate_image, generate_text
from zoo.registry import tokenizers
from zoo.tokenizers.mingtok.head import FlowHeadConfig

SHIPPED = [
    name
    for name in tokenizers.list(pretrained=True)
    if not tokenizers.preset(name).weights.location.startswith("hf://")
]
SMALL = [
    *("module.lm.hidden_size=32", "module.lm.num_hidden_layers=1", "module.lm.intermediate_size=32"),
    *("module.lm.num_attention_heads=2", "module.lm.num_key_value_heads=2", "module.text_tokenizer.vocab_size=300"),
    "data.train.split=val",  # of fewer captions
    *("module.head.condition_dim=32", "module.head.width=32", "module.head.depth=1", "+module.head.num_steps=2"),
]
TO_IMAGE, NEVER = torch.tensor([True, False, False, True]), torch.zeros(4, dtype=torch.bool)
SIZES = {name: HEAD[name] for name in ("condition_dim", "width", "depth", "num_steps")}


@pytest.fixture(scope="module")
def batch():
    return next(iter(Loader(scenes("val"), batch_size=4, fields=["image", "depth", "caption"])))


def training(name, *overrides):
    torch.manual_seed(0)
    cfg = cli.compose("train", ["experiment=lm", f"tokenizer={name}", *SMALL, *overrides])
    module = instantiate(cfg.module, tokenizer=instantiate(cfg.tokenizer))
    # all that a loss asks of a trainer
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=0))
    module._trainer = SimpleNamespace(world_size=1, global_rank=0, fit_loop=loop, datamodule=None)
    return module


@pytest.mark.parametrize("name", SHIPPED)
def test_the_common_recipe_learns_both_directions_on(name, batch):
    module, history = training(name), []
    optimizer = torch.optim.AdamW(module.model.parameters(), lr=1e-2)
    for _ in range(3):
        ((_, loss, logs),) = module.losses(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(logs)
    for kind in ("text", module.model.vision.kind):
        assert history[-1][f"{kind}_loss"] < history[0][f"{kind}_loss"]
    images = batch[module.tokenizer.info.input][:1]
    written = generate_image(module.model.eval(), batch["caption"][:1], generator=generators(1))
    assert written.images.shape == images.shape
    assert len(generate_text(module.model, images, max_new_tokens=2)) == 1


def test_there_are_tokenizers_of_every_kind_among_these():
    infos = [tokenizers.load(name).info for name in SHIPPED]
    assert {info.kind for info in infos} == {"discrete", "continuous"}
    assert any(info.variable_length for info in infos)
    assert any(info.decoded for info in infos)
    assert any(info.input == "depth" for info in infos)


@pytest.mark.parametrize("name", ["vqgan-tiny", "kl-tiny", "mingtok-tiny"])
def test_images_are_encoded_once_and_give_the_same_losses(name, batch, monkeypatch):
    once, anew = training(name), training(name, "module.keep_tokens=false")
    seen, perceive = [], once.model.vision.perceive
    monkeypatch.setattr(once.model.vision, "perceive", lambda images: seen.append(len(images)) or perceive(images))
    some = {key: rows[:3] for key, rows in batch.items()}
    for one in (some, batch, batch):
        found = [next(module.losses(one))[1] for module in (once, anew)]
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
        found[0].backward()
    assert seen == [3, 1]
    assert all(p.grad is not None for p in once.model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["dualtoken-tiny", "karl-tiny", "kl-tiny", "mingtok-tiny"])
def test_tokens_that_were_kept_give_the_losses_of_their_images(name, batch):
    module = training(name)
    tokens = module.model.vision.encode(batch["image"])
    stored = module.checked({"caption": batch["caption"], "tokens": tokens})
    found = [next(module.losses(one))[1] for one in (batch, stored)]
    torch.testing.assert_close(*found)
    shown = module.pictures(stored, 1)
    torch.testing.assert_close(shown[:1], module.tokenizer.decode(tokens[:1]))


def test_zoo_train_reads_the_tokens_of_zoo_pretokenize(tmp_path, capsys):
    folder, options = tmp_path / "tokens", ["tokenizer=karl-tiny", "data.num_workers=0"]
    scenes = ["split=val", "data.fields=[image,caption]", "num_shards=1", "device=cpu", f"output_dir={folder}"]
    assert pretokenize([*options, *scenes, "encode.num_tokens=32"]) == 0
    assert TokenDataset(folder)[0]["tokens"].lengths.tolist() == [32]
    small = [one for one in SMALL if not one.startswith("data.")]
    run = ["experiment=lm", *options, *small, "data=tokens", f"data.path={folder}", f"data.val_path={folder}"]
    run += ["data.fields=[tokens,caption]", "trainer=tiny-debug", "trainer.max_steps=2"]
    assert train([*run, f"output_dir={tmp_path / 'run'}"]) == 0, capsys.readouterr().err
    images = generate_image(VisualLM.load(tmp_path / "run/model"), ["A red cube."], generator=generators(1)).images
    assert images.shape == (1, 3, 64, 64)
    assert train([*run, "module.token_share=0.25", f"output_dir={tmp_path / 'other'}"]) == 2
    assert "an image has 32 tokens and the model reads 16 of each" in capsys.readouterr().err


def test_images_that_change_cannot_be_encoded_once():
    module = training("vqgan-tiny")
    for options in ({"flip": True}, {"crop": "resized"}):
        module._trainer.datamodule = SimpleNamespace(options=options)
        with pytest.raises(ZooError, match="set keep_tokens=false, or no flips and crops"):
            module.on_fit_start()
    module._trainer.datamodule = SimpleNamespace(options={"flip": False, "crop": "center"})
    module.on_fit_start()


# Streams by direction


def test_what_is_decoded_is_written_and_what_is_not_is_read(tmp_path):
    model = make_codes("residual", by_direction=True)
    read, written = ([stream.name for stream in model.vision.standing(one)] for one in (False, True))
    assert (read, written) == (["semantic"], ["pixel"])
    rows, run = [], model.run
    model.run = lambda inputs, live, keep, **rest: rows.append(live.sum(1)) or run(inputs, live, keep, **rest)
    _, codes = model(CAPTIONS, pictures(4), TO_IMAGE, NEVER)
    words = torch.tensor([len(model.text_ids(caption)) for caption in CAPTIONS])
    assert torch.equal(rows[0], words + torch.where(TO_IMAGE, 2 + 4 * 3, 2 + 4 * 2 + 1))
    assert len(codes) == 2 * 4 * 3
    images, tokens = generate_image(model, CAPTIONS, generator=generators(4))
    assert tokens.ids.keys() == {"pixel"}
    torch.testing.assert_close(images, model.vision.tokenizer.decode(tokens))
    model.save(tmp_path)
    loaded = VisualLM.load(tmp_path)
    assert torch.equal(generate_image(loaded, CAPTIONS, generator=generators(4)).images, images)
    assert generate_text(loaded, pictures(4), max_new_tokens=4) == generate_text(model, pictures(4), max_new_tokens=4)


def test_a_caption_depends_on_the_streams_that_are_read_alone():
    model = make_codes("residual", by_direction=True)
    seen = model.vision.see(pictures(4))
    for name, same in (("pixel", True), ("semantic", False)):
        ids = dict(seen.tokens.ids) | {name: (seen.tokens.ids[name] + 1) % 5}
        other = seen._replace(tokens=zoo.Tokens(ids))
        found = [model(CAPTIONS, one, NEVER, NEVER)[0] for one in (seen, other)]
        assert torch.equal(*found) == same


def test_a_tokenizer_whose_streams_are_all_decoded_reads_and_writes_them():
    model = make_codes(by_direction=True)
    assert model.vision.standing(True) == model.vision.standing(False) == model.vision.streams


# Latents without features

LATENTS = {
    "kl": ("kl-tiny", {"image_size": 16, "multipliers": (1, 1, 2, 2)}, {}),
    "karl": ("karl-tiny", {"quantize": False}, {"num_tokens": 5}),
}


def latent_model(kind):
    name, sizes, settings = LATENTS[kind]
    torch.manual_seed(0)
    tokenizer = zoo.create_tokenizer(name, **sizes).eval()
    model = VisualLM.create(language_model({}, CODE_SIZES), text_words(), tokenizer, SIZES, **settings)
    with torch.no_grad():  # a fresh flow head is zero, and hears no condition
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def images_for(model):
    side = model.vision.tokenizer.info.image_size
    return torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_latents_are_read_as_they_are_and_written_one_after_the_other():
    model = latent_model("kl")
    vision, images = model.vision, images_for(model)
    seen = vision.see(images)
    latents = vision.tokenizer.encode(images).latents["image"]
    torch.testing.assert_close(seen.latents, latents)
    torch.testing.assert_close(seen.inputs, vision.head.project(latents))
    # every row from its beginning in every step, nothing cached
    begin = torch.tensor([model.vocabulary.id_of("<image>")])
    rows = [model.embed(torch.cat([model.join(text), begin])[None]) for text in (model.text_ids(CAPTIONS[0]), [])]
    generator, written = generators(1)[0], []
    for _ in range(4):
        z = [vision.head.condition(model.lm.base_model(inputs_embeds=row).last_hidden_state[:, -1]) for row in rows]
        written.append(vision.head.sample(*z, text_scale=3.0, noise=torch.randn(1, 8, generator=generator)))
        rows = [torch.cat([row, vision.head.project(written[-1])[:, None]], dim=1) for row in rows]
    found = generate_image(model, CAPTIONS[:1], generator=generators(1))
    torch.testing.assert_close(found.tokens.latents["image"][0], torch.cat(written), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.images, vision.tokenizer.decode(found.tokens))
    assert found.tokens.grid == vision.tokenizer.encode(images).grid


@pytest.mark.parametrize("kind", LATENTS)
def test_a_model_of_latents_comes_back(kind, tmp_path):
    model = latent_model(kind)
    model.save(tmp_path)
    loaded, images = VisualLM.load(tmp_path), images_for(model)
    assert loaded.vision.head.config == model.vision.head.config
    pair = [generate_image(one, CAPTIONS, generator=generators(4)).images for one in (model, loaded)]
    assert torch.equal(*pair)
    assert pair[0].shape == images.shape
    draws = model.vision.draws(4, generators(1)[0])
    torch.manual_seed(0)  # karl's base draws its latents
    ours = model(CAPTIONS, images, TO_IMAGE, NEVER, *draws)
    torch.manual_seed(0)
    theirs = loaded(CAPTIONS, images, TO_IMAGE, NEVER, *draws)
    assert all(torch.equal(*both) for both in zip(ours, theirs, strict=True))
    assert len(ours[1]) == 2 * model.vision.length


def made(name, head=SIZES, streams=None, num_tokens=None, **sizes):
    tokenizer = zoo.create_tokenizer(name, **sizes)
    return VisualLM.create(language_model({}), text_words(), tokenizer, head, streams, num_tokens)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: made("kl-tiny", {"depht": 2}), "FlowHeadConfig has no field 'depht'; did you mean depth"),
        (lambda: made("kl-tiny", FlowHeadConfig(**HEAD)), "latent_dim 4 and kl-tiny needs 8; set head.latent_dim"),
        (lambda: made("kl-tiny", num_tokens=3), "num_tokens is for tokenizers of variable length"),
        (lambda: made("karl-tiny", quantize=False), "karl-tiny has latents of variable length; say with num_tokens"),
        (lambda: made("kl-tiny", streams=["image"]), "kl-tiny has latents, .* and no streams"),
    ],
)
def test_what_does_not_fit_is_refused(call, complaint):
    with pytest.raises(ZooError, match=complaint):
        call()


def test_a_share_of_tokens_is_for_variable_length():
    assert training("karl-tiny", "module.token_share=0.25").model.vision.num_tokens == 16
    assert training("vqgan-tiny", "module.token_share=0.25").model.vision.num_tokens is None

"""How MingTok is trained."""

import pytest
import torch
import torch.nn.functional as F
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from PIL import Image

import zoo
from zoo import registry
from zoo.commands import cli
from zoo.data import Loader, scenes

SIZES = {
    **{f"{part}_{name}": n for part in ("encoder", "semantic", "pixel") for name, n in (("width", 32), ("depth", 1))},
    "head_dim": 16,
}
SMALL = [f"tokenizer.{name}={size}" for name, size in SIZES.items()]
SGD = ["optimizer._target_=torch.optim.SGD", "~optimizer.betas", "optimizer.lr=1e-2", "schedule.warmup_steps=0"]


def module(stage, *overrides):
    torch.manual_seed(0)
    cfg = cli.compose("train", [f"experiment=mingtok-tiny-{stage}", "weights=null", *SMALL, *overrides])
    made = instantiate(cfg.module, tokenizer=instantiate(cfg.tokenizer))
    # all that a loss asks of a trainer
    loop = type("Loop", (), {"epoch_loop": type("Epoch", (), {"total_batch_idx": 0})()})()
    made._trainer = type("Alone", (), {"world_size": 1, "global_rank": 0, "fit_loop": loop, "global_step": 0})()
    return made


@pytest.fixture(scope="module")
def batch():
    return next(iter(Loader(scenes("val"), batch_size=4, fields=["image"])))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, train_on):
    """Folders of the three stages, the second on one rank and on two; and what the second logged."""
    folder = tmp_path_factory.mktemp("mingtok")
    train_on(1, folder / "1", "mingtok-tiny-1", *SMALL)
    start = [f"weights={folder}/1/tokenizer.safetensors", *SMALL]
    logs = [train_on(n, folder / f"2-{n}", "mingtok-tiny-2", *start, *SGD) for n in (1, 2)]
    exact = "callbacks.ema.decay=0.0"  # an average of equal weights is rounded
    train_on(1, folder / "3", "mingtok-tiny-3", f"weights={folder}/2-1/tokenizer.safetensors", exact, *SMALL)
    return folder, logs


def load(folder):
    return zoo.load_tokenizer("mingtok-tiny", weights=folder / "tokenizer.safetensors")


def test_two_ranks_train_as_one(trained):
    folder, (one, two) = trained
    assert two["train/gradient_norm/tokenizer"] == pytest.approx(one["train/gradient_norm/tokenizer"], rel=1e-4)
    assert {"val/latent", "val/semantic", "val/psnr"} <= two.keys()
    expected = load(folder / "2-1").state_dict()
    for name, tensor in load(folder / "2-2").state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)


def test_each_stage_trains_its_parts(trained):
    folder, _ = trained
    before, after, last = (load(folder / stage).state_dict() for stage in ("1", "2-1", "3"))
    moved = [
        {name.split(".")[0] for name in one if not torch.equal(one[name], two[name])}
        for one, two in ((before, after), (after, last))
    ]
    assert moved == [{"encoder", "semantic_decoder", "pixel_decoder"}, {"pixel_decoder"}]


def test_the_statistics_of_latents_are_measured_and_stored(trained):
    tokenizer = load(trained[0] / "3")
    assert tokenizer.config.is_normalized
    batches = Loader(scenes("val"), batch_size=64, fields=["image"])
    latents = torch.cat([tokenizer.encode(batch["image"]).latents["image"] for batch in batches])
    assert latents.mean().item() == pytest.approx(0, abs=0.05)
    assert latents.std().item() == pytest.approx(1, abs=0.1)


def test_pictures_show_what_was_hidden_and_what_came_of_it(trained, batch):
    folder, _ = trained
    rows = [Image.open(next((folder / stage / "pictures").glob("*.png"))).height // 66 for stage in ("1", "3")]
    assert rows == [5, 3]
    made = module(1)
    pictures = made.pictures(batch, 2)
    assert pictures.shape == (10, 3, 64, 64)
    hidden = (pictures[6:8] == 0.5).all(1).unflatten(1, (8, 8)).unflatten(3, (8, 8)).all(4).all(2)
    assert hidden.sum((1, 2)).tolist() == [32, 32]
    shown = ~hidden.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].expand(-1, 3, -1, -1)
    assert torch.equal(pictures[6:8][shown], batch["image"][:2][shown])


def test_the_loss_is_what_the_recipe_says(batch):
    made = module(2, "module.masked_weight=0.7", "module.semantic_weight=0.3", "module.latent_weight=0.2")
    (name, loss, logs), *rest = made.losses(batch)
    assert (name, rest) == ("tokenizer", [])
    tokenizer, values = made.tokenizer, 2 * batch["image"] - 1
    latents = tokenizer.encoder(values)[:, :-1]
    features = tokenizer.semantic_decoder(latents)
    expected = F.mse_loss(tokenizer.pixel_decoder(features), values)
    mask = made.random_mask(4, made.shared_generator())
    seen = tokenizer.encoder(values[::2], mask[::2], made.aids.mask_token)[:, :-1]
    expected = expected + 0.7 * F.mse_loss(tokenizer.pixel_decoder(tokenizer.semantic_decoder(seen)), values[::2])
    for key, weight, found in (("latent", 0.2, latents), ("semantic", 0.3, features)):
        to_learn = made.teachers[key](batch["image"])
        cosine = F.cosine_similarity(made.aids.projectors[key](found), to_learn, dim=-1)
        torch.testing.assert_close(logs[key], weight * (1 - cosine).mean())
        expected = expected + weight * (1 - cosine).mean()
    torch.testing.assert_close(loss, expected)


def test_as_many_patches_of_each_image_are_hidden(batch):
    made = module(1, "module.mask_ratio=0.3")
    mask = made.random_mask(50, torch.Generator().manual_seed(0))
    assert mask.sum(1).tolist() == [round(0.3 * 64)] * 50
    assert len(mask.unique(dim=0)) == 50


@pytest.mark.parametrize(("ranks", "batch", "every"), [(1, 4, 2), (4, 1, 2), (2, 3, 2), (3, 4, 5), (2, 2, 1)])
def test_masked_images_do_not_depend_on_the_number_of_ranks(ranks, batch, every):
    made, found, shares = module(1, f"module.masked_every={every}"), [], []
    for rank in range(ranks):
        made._trainer.world_size, made._trainer.global_rank = ranks, rank
        some, share = made.masked_images(batch)
        found += [rank * batch + i for i in range(batch)[some] if share]
        shares.append(share)
    assert found == list(range(0, ranks * batch, every))
    assert sum(shares) == pytest.approx(ranks)


def test_a_discriminator_and_its_weight_stand_on_the_last_layer(batch):
    adversarial = ["module.adversarial_weight=0.1", "module.discriminator_width=8"]
    made = module(3, *adversarial, "+module.optimizers.discriminator=${optimizer}")
    steps = {name: logs for name, _, logs in made.losses(batch)}
    assert list(steps) == ["discriminator", "tokenizer"]
    assert made.last_layer is made.tokenizer.pixel_decoder.head.weight


@pytest.mark.parametrize(
    ("stage", "override", "complaint"),
    [
        (
            1,
            "module.trained=[encoder,decoder]",
            r"some of encoder, semantic_dec.* got \['encoder', 'd",
        ),
        (1, "module.trained=[]", r"trained must be some of .* got \[\]"),
        (1, "module.mask_ratio=1.0", "mask_ratio must be between 0 and 1, got 1.0"),
        (1, "module.masked_every=0", "masked_every must be at least 1, got 0"),
        (2, "tokenizer.patch_size=16", "siglip-tiny has 64 features of an image, and mingtok-tiny has 16 latents"),
        (2, "module.semantic_teacher.name=kl-tiny", "kl-tiny has no features"),
    ],
)
def test_what_does_not_fit_is_said_in_one_sentence(stage, override, complaint):
    with pytest.raises(InstantiationException, match=complaint):
        module(stage, override)


def test_the_published_recipes_compose_and_their_teachers_fit_the_grid():
    import timm

    for stage in (1, 2, 3):
        cfg = cli.compose("train", [f"experiment=mingtok-{stage}", "weights=stage.safetensors"])
        assert cfg.tokenizer.name == "mingtok-vision"
        for key in ("latent_teacher", "semantic_teacher"):
            if (teacher := cfg.module[key]) is not None:
                size = {} if teacher.get("image_size") is None else {"img_size": teacher.image_size}
                with torch.device("meta"):
                    model = timm.create_model(teacher.name.removeprefix("timm/"), num_classes=0, **size)
                assert model.patch_embed.num_patches == (512 // 32) ** 2


def test_the_trained_tokenizer_loads_by_name(batch):
    tokenizer = zoo.load_tokenizer("mingtok-tiny")
    assert tokenizer.config.is_normalized
    error = (tokenizer.reconstruct(batch["image"]) - batch["image"]).square().flatten(1).mean(1)
    assert (-10 * error.log10()).mean() > 25
    assert registry.weights_path("mingtok-tiny").stat().st_size <= 16e6

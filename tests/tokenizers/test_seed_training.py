"""How SEED is trained."""

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hydra.errors import InstantiationException
from hydra.utils import instantiate

import zoo
from zoo.commands import cli
from zoo.data import Loader, scenes
from zoo.tokenizers.seed import published
from zoo.tokenizers.seed.language import ids_to_text, seed_vocabulary
from zoo.tokenizers.seed.tokenizer import SeedTokenizer
from zoo.tokenizers.seed.training import SeedCodebookTraining, SeedContrastiveTraining, clean_caption
from zoo.training.schedules import epoch_cosine

SGD = ["optimizer._target_=torch.optim.SGD", "~optimizer.betas", "optimizer.lr=1e-2", "schedule.warmup_steps=0"]
EXACT = "callbacks.ema.decay=0.0"  # an average of equal weights is rounded
SMALL = [
    f"tokenizer.{name}" for name in ("qformer.depth=2", "qformer.hidden=96", "codebook_size=64", "decoder_depth=1")
]
VECTORS = json.loads((Path(__file__).parents[1] / "reference" / "seed" / "golden-tiny.json").read_text())


def module(stage, *overrides):
    torch.manual_seed(0)
    cfg = cli.compose("train", [f"experiment=seed-tiny-{stage}", *SMALL, *overrides])
    made = instantiate(cfg.module, tokenizer=instantiate(cfg.tokenizer))
    made._trainer = SimpleNamespace(world_size=1, global_rank=0)  # all that a loss asks of a trainer
    made._trainer.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=0))
    return made


@pytest.fixture(scope="module")
def batch():
    return next(iter(Loader(scenes("val"), batch_size=4, fields=["image", "caption"])))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, train_on):
    """Folders of both stages on one rank and on two, what they logged; what came before, and the aim of SEED-1."""
    folder = tmp_path_factory.mktemp("seed")
    train_on(1, folder / "0", "seed-tiny-0", EXACT, *SMALL)
    start = f"weights={folder}/0/tokenizer.safetensors"
    first = [train_on(n, folder / f"1-{n}", "seed-tiny-1", start, EXACT, *SMALL, *SGD) for n in (1, 2)]
    start = f"weights={folder}/1-1/tokenizer.safetensors"
    second = [train_on(n, folder / f"2-{n}", "seed-tiny-2", start, EXACT, *SMALL, *SGD) for n in (1, 2)]
    train_on(1, folder / "text", "seed-tiny-2-text", start, EXACT, *SMALL)
    return folder, first, second


def load(folder):
    return zoo.load_tokenizer("seed-tiny", weights=folder / "tokenizer.safetensors")


def test_two_ranks_train_as_one(trained):
    folder, *stages = trained
    for stage, (one, two) in enumerate(stages, 1):
        name = "train/gradient_norm/tokenizer"
        assert two[name][0] == pytest.approx(one[name][0], rel=1e-4)
        assert two[name] == pytest.approx(one[name], rel=1e-2)
        expected = load(folder / f"{stage}-1").state_dict()
        for name, tensor in load(folder / f"{stage}-2").state_dict().items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-3)
    assert {"val/image_to_text_recall@1", "val/loss"} <= stages[0][0].keys()
    assert {"val/text_to_image_recall@1", "val/embedding_cosine", "train/perplexity/image"} <= stages[1][0].keys()


def test_each_stage_trains_its_parts(trained):
    folder, *_ = trained
    states = [load(folder / stage).state_dict() for stage in ("0", "1-1", "2-1")]
    moved = [
        {name.split(".")[0] for name in one if not torch.equal(one[name], two[name])} for one, two in pairwise(states)
    ]
    queries = {"encoder_norm", "qformer", "query_tokens"}
    behind = {
        "encode_task",
        "quantizer",
        "decode_task",
        "pos_embed",
        "blocks",
        "pos_embed_image",
        "blocks_image",
        "head",
    }
    assert moved[0] == queries | {"image_proj", "text_proj", "temperature"}
    assert moved[1] == behind
    tower = zoo.load_encoder("siglip-tiny").vision.state_dict()
    assert torch.equal(states[2]["encoder.blocks.3.mlp.fc1.weight"], tower["blocks.3.mlp.fc1.weight"])


def test_the_aim_of_seed_1_is_a_sequence_of_text_features(trained):
    folder, *_ = trained
    tokenizer = load(folder / "text")
    assert tokenizer.info.decodes_to == "embedding"
    assert tokenizer.reconstruct(torch.rand(2, 3, 64, 64)).shape == (2, 66, 128)


def test_the_tower_is_that_of_siglip():
    made, encoder = module(0), zoo.load_encoder("siglip-tiny")
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        ours = made.tokenizer.encoder(made.tokenizer.to_values(images))
        theirs = encoder.vision.layers(encoder.vision.embed(2 * images - 1))
    assert (ours - theirs).abs().max() < 2e-3 * theirs.abs().max()  # two forms of GELU


def test_the_second_loss_is_what_the_recipe_says(batch):
    made = module(2, "weights=null", "needs_weights=false")
    made.tokenizer.quantizer.eval()
    ((name, loss, logs),) = made.losses(batch)
    tokenizer, encoder = made.tokenizer, zoo.load_encoder("siglip-tiny")
    with torch.no_grad():
        queries = tokenizer.query(tokenizer.to_values(batch["image"]))
        output = tokenizer(queries)
        wanted = encoder.vision(2 * batch["image"] - 1)
    expected = {
        "codebook": output.quantized.loss,
        "queries": 2 * (1 - F.cosine_similarity(output.reconstruction, queries, dim=-1).mean()),
        "embedding": 0.5 * F.mse_loss(output.embedding, wanted),
    }
    for term, value in expected.items():
        torch.testing.assert_close(logs[term], value)
    assert name == "tokenizer"
    torch.testing.assert_close(loss.detach(), sum(expected.values()))


def test_false_captions_and_mirrors_belong_to_the_first_stage_alone(batch):
    made = module(1)
    ((_, with_false, _),) = made.losses(batch)
    made.alternatives = []
    ((_, without, _),) = made.losses(batch)
    assert with_false > without
    assert not hasattr(SeedCodebookTraining, "alternatives")


def test_queries_are_asked_for_what_they_read_where_that_is_wanted(batch):
    made = module(1, "~module.weights.features")
    ((_, loss, logs),) = made.losses(batch)
    assert made.feature_head is None
    torch.testing.assert_close(loss.detach(), logs["contrastive"])
    made = module(1, "module.weights.contrastive=0.5", "module.weights.features=2.0")
    ((_, loss, logs),) = made.losses(batch)
    torch.testing.assert_close(loss.detach(), 0.5 * logs["contrastive"] + 2 * logs["features"])
    loss.backward()
    assert all(p.grad is not None for p in made.feature_head.parameters())


def test_the_stage_before_the_first_reads_no_caption(batch):
    made = module(0)
    ((_, loss, logs),) = made.losses(batch)
    torch.testing.assert_close(loss.detach(), logs["features"])
    assert not made.tokenizer.image_proj.weight.requires_grad
    assert made.tokenizer.query_tokens.requires_grad


@pytest.mark.parametrize("stage", [1, 2])
def test_the_tower_is_never_in_training_mode(stage):
    made = module(stage, "needs_weights=false")
    made.train()
    assert not made.tokenizer.encoder.training
    assert made.tokenizer.encode_task.training
    assert made.tokenizer.qformer.training is (stage == 1)  # of stage 2 with module.dropout=false


def test_the_frozen_q_former_keeps_its_dropout_as_published(batch):
    noisy = ["needs_weights=false", "tokenizer.qformer.dropout=0.5"]
    for dropout in (True, False):
        made = module(2, *noisy, f"module.dropout={dropout}".lower())
        made.train()
        values = made.tokenizer.to_values(batch["image"])
        with torch.no_grad():
            same = torch.equal(made.tokenizer.query(values), made.tokenizer.query(values))
        assert same is (not dropout)


def test_one_pair_alone_is_a_batch(batch):
    made = module(1)
    one = {name: values[:1] for name, values in batch.items()}
    ((_, loss, _),) = made.losses(one)
    assert loss.isfinite()
    ((_, loss, _),) = module(2, "needs_weights=false").losses(one)
    assert loss.isfinite()


# What the published code says beside its numbers


@pytest.mark.parametrize(("caption", "expected"), VECTORS["text"]["caption"])
def test_captions_are_cleaned_as_published(caption, expected):
    assert clean_caption(caption) == expected


@pytest.mark.parametrize(("codes", "text", "ids"), VECTORS["text"]["image_words"])
def test_words_of_an_image(codes, text, ids):
    vocabulary = seed_vocabulary()
    assert vocabulary.to_ids("image", torch.tensor(codes)).tolist() == ids
    assert ids_to_text(codes) == text
    assert [vocabulary.id_of(word) for word in ("<img>", "</img>")] == [40192, 40193]


def trainable(training):
    config = training.tokenizer.config
    names = {name: p for name, p in training.tokenizer.named_parameters() if p.requires_grad}
    return set(published.to_published(names, config)) - {
        f"{kind}.embeddings.position_ids" for kind in published.QFORMERS
    }


@pytest.mark.parametrize("case", VECTORS["trainable"])
def test_what_learns_is_what_learns_there(case):
    of = {"stage1_trainable": "causal_qformer"}
    name = of.get(case) or next(c["module"] for c in VECTORS["cases"] if c["name"] == case.removesuffix("_trainable"))
    with torch.device("meta"):
        tokenizer = SeedTokenizer(published.config_from_published(VECTORS["modules"][name]["config"]))
        if name == "causal_qformer":
            training = SeedContrastiveTraining(tokenizer, optimizers={})
        else:
            training = SeedCodebookTraining(tokenizer, None, {}, optimizers={})
    assert trainable(training) == {n for n in VECTORS["trainable"][case] if not n.startswith("Qformer.cls.")}


def test_the_published_recipes_are_those_of_the_authors():
    rates = {1: (3e-5, 3e-6, 3e-7, 10, 64), 2: (1e-4, 1e-5, 1e-6, 500, 256)}
    for stage, (peak, least, first, epochs, size) in rates.items():
        cfg = cli.compose("train", [f"experiment=seed-stage-{stage}", "data.train=x.tar"])
        schedule = instantiate(cfg.schedule)
        assert (cfg.optimizer.lr, cfg.data.batch_size, cfg.trainer.max_epochs) == (peak, size, epochs)
        assert peak * schedule(0, total=10_000 * epochs, epoch=10_000) == pytest.approx(first)
        assert peak * schedule.keywords["min_ratio"] == pytest.approx(least)
        assert dict(cfg.optimizer)["weight_decay"] == 0.05
        assert cfg.seed == 42
    assert dict(cfg.module.weights) == {"codebook": 5, "queries": 2, "embedding": 0.5}
    text = cli.compose("train", ["experiment=seed-stage-2-text", "data.train=x.tar"])
    head = text.tokenizer.head
    assert (head.num_queries, head.dim) == zoo.registry.preset("seed").config.head.shape


def test_a_schedule_that_moves_with_epochs():
    at = lambda step: epoch_cosine(step, 100, 10, warmup_steps=5, first_ratio=0.1, min_ratio=0.2)  # noqa: E731
    assert [at(step) for step in (0, 5, 9)] == pytest.approx([0.1, 1, 1])
    assert at(10) == at(19) != at(20)
    assert at(1000) == pytest.approx(0.2)
    assert epoch_cosine(3, 100, 10) == 1
    with pytest.raises(zoo.ZooError, match="needs the length of the run and of an epoch"):
        epoch_cosine(0, -1, 10)


@pytest.mark.parametrize(
    ("stage", "overrides", "complaint"),
    [
        (1, ["tokenizer.qformer.vocab_size=0"], "the first stage needs texts"),
        (0, ["module.tower.name=siglip-tin"], "no encoder is called 'siglip-tin'; did you mean siglip-tiny"),
        (0, ["tokenizer.encoder.depth=3"], "choose the encoder of its sizes, or leave tower out"),
        (1, ["+module.weights.feature=1.0"], "the loss has no term 'feature'; did you mean features"),
        (2, ["+module.weights.pixels=1.0"], "the loss has no term 'pixels'"),
        (2, ["tokenizer.head.dim=64"], r"the target is of shape \(128,\) and .* makes embeddings of \(64,\)"),
        (2, ["module.bert=some-bert"], "bert= is for a head of kind 'qformer'"),
        (2, ["module.bert=/no/bert", "tokenizer.head.kind=qformer"], "'/no/bert' is not on this machine"),
    ],
)
def test_what_does_not_fit_is_said_in_one_sentence(stage, overrides, complaint):
    with pytest.raises(InstantiationException, match=complaint):
        module(stage, "needs_weights=false", *overrides)


def test_the_head_begins_as_a_bert(tmp_path):
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 96, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 20}
    torch.manual_seed(1)
    BertModel(BertConfig(num_hidden_layers=3, **sizes)).save_pretrained(tmp_path)
    kind = ["needs_weights=false", "tokenizer.head.kind=qformer", "tokenizer.head.depth=2", f"module.bert={tmp_path}"]
    made = module(2, *kind)
    bert = BertModel.from_pretrained(tmp_path)
    layer, theirs = made.tokenizer.head.qformer.layers[1], bert.encoder.layer[1].attention
    assert torch.equal(layer.attn.k.weight, theirs.self.key.weight)
    assert torch.equal(layer.attn.norm.weight, theirs.output.LayerNorm.weight)
    with pytest.raises(
        InstantiationException, match="is of other sizes than the head of seed-tiny, or has fewer layers"
    ):
        module(2, *kind, "tokenizer.head.depth=4")

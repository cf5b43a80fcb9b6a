"""What SEED promises beyond the numbers of the reference."""

import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo import Tokens, ZooError, weights
from zoo.tokenizers.seed import published
from zoo.tokenizers.seed.merge import merge
from zoo.tokenizers.seed.qformer import QFormer, QFormerConfig
from zoo.tokenizers.seed.tokenizer import TEXT_MARKS, EVAConfig, HeadConfig, SeedConfig, SeedTokenizer

WORDS = (*TEXT_MARKS, "a", "red", "blue", "cube", "ring", "two")
QUERIES = QFormerConfig(width=24, depth=3, num_heads=2, hidden=48, vocab_size=len(WORDS), max_positions=40)
SIZES = {
    **{"image_size": 32, "encoder": EVAConfig(8, 16, 2, 2), "qformer": QUERIES, "codebook_size": 24, "embed_dim": 6},
    **{"decoder_depth": 1, "head": HeadConfig(dim=20, widths=(16, 4)), "text_dim": 12, "text_length": 8},
    **{"text_tokenizer": "", "vocabulary": WORDS},
}


def make(**changes):
    torch.manual_seed(0)
    tokenizer = SeedTokenizer(SeedConfig(**SIZES | changes))
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        tokenizer.quantizer.codebook.normal_()
    return tokenizer.eval()


def qformer(**changes):
    torch.manual_seed(0)
    return QFormer(
        QFormerConfig(**{"width": 24, "depth": 3, "num_heads": 2, "hidden": 48, "vocab_size": 9} | changes), 16
    ).eval()


def images(count=2, size=32):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(5))


class Pixels:
    """A decoder that shows the first three numbers of an embedding."""

    embed_shape = (20,)

    def to(self, device):
        return self

    def decode(self, embeddings, negative=None, scale=1.0):
        self.negative = negative
        return (scale * embeddings[:, :3, None, None].expand(-1, -1, 4, 4)).sigmoid()


# The contract


def test_ids_embeddings_and_features():
    tokenizer = make()
    tokens = tokenizer.encode(images())
    assert tokens.ids["image"].shape == (2, 32)
    assert tokenizer.info.decodes_to == "embedding"
    assert tokenizer.decode(tokens).shape == (2, 20)
    assert tokenizer.decode(tokens).min() < 0, "an embedding is not clamped as images are"
    assert tokenizer.features(images()).shape == tokenizer.features(images(), quantized=False).shape == (2, 32, 24)
    torch.testing.assert_close(tokenizer.features_of(tokens), tokenizer.features(images()))
    torch.testing.assert_close(tokenizer.embedding_of(tokens), tokenizer.encode_image(images()))
    assert tokenizer.similarity(images(), ["a red cube", "two"]).shape == (2, 2)


def test_a_batch_equals_its_images_one_by_one():
    tokenizer, batch = make(), images(3)
    tokens, texts = tokenizer.encode(batch), ["a red cube", "two", "blue ring a a"]
    decoded, read = tokenizer.decode(tokens), tokenizer.encode_text(texts)
    for i in range(3):
        alone = tokenizer.encode(batch[i : i + 1])
        assert torch.equal(alone.ids["image"], tokens[i].ids["image"])
        torch.testing.assert_close(tokenizer.decode(alone), decoded[i : i + 1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tokenizer.encode_text(texts[i : i + 1]), read[i : i + 1], rtol=1e-4, atol=1e-5)


def test_ids_and_codes_have_one_order():
    tokenizer = make()
    tokens = tokenizer.encode(images())
    swapped = Tokens({"image": tokens.ids["image"].flip(1)})
    assert not torch.allclose(tokenizer.decode(swapped), tokenizer.decode(tokens))


def test_a_decoder_makes_pixels():
    tokenizer, decoder = make(), Pixels()
    tokens = tokenizer.encode(images())
    embedding = tokenizer.decode_embedding(tokens)
    assert tokenizer.attach(decoder) is tokenizer
    assert tokenizer.info.decodes_to == "pixels"
    torch.testing.assert_close(tokenizer.decode(tokens), decoder.decode(embedding))
    torch.testing.assert_close(tokenizer.decode(tokens, scale=0.0), torch.full((2, 3, 4, 4), 0.5))
    tokenizer.decode(tokens, negative=tokens[1])
    torch.testing.assert_close(decoder.negative, embedding[1:])
    assert not any("decoder" in name for name in tokenizer.state_dict())


def test_a_decoder_of_another_width_is_refused():
    with pytest.raises(ZooError, match=r"embeddings of shape \(20,\) and .* makes \(24,\)"):
        make(head=HeadConfig(dim=24, widths=(16, 4))).attach(Pixels())


@pytest.mark.parametrize("source", ["no-such-decoder", "/no/such/folder"])
def test_a_decoder_that_cannot_be_had_is_named(source):
    tokenizer = make(decoder=source)
    with pytest.raises(ZooError, match=source):
        tokenizer.reconstruct(images())


def test_a_sequence_of_vectors_is_the_embedding_of_seed_1():
    tokenizer = make(head=HeadConfig("qformer", 20, num_queries=7, depth=2))
    assert tokenizer.reconstruct(images()).shape == (2, 7, 20)
    assert not tokenizer.head.qformer.config.is_causal(7)


def test_bfloat16_gives_nearly_the_same_ids():
    whole, half = make(), make().to(torch.bfloat16)
    ids = [tokenizer.encode(images(8)).ids["image"] for tokenizer in (whole, half)]
    assert (ids[0] == ids[1]).float().mean() > 0.9
    assert half.reconstruct(images()).dtype == torch.bfloat16


# The causal order


def test_later_queries_never_reach_earlier_ones():
    net, context = qformer(), torch.randn(2, 5, 16)
    queries = torch.randn(1, 32, 24)
    changed = queries.clone()
    changed[:, 20] += torch.randn(24)
    before, after = (net(q, context) for q in (queries, changed))
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.isclose(before[:, 20:], after[:, 20:]).all(-1).any()


@pytest.mark.parametrize(
    ("causal", "count", "expected"),
    [("auto", 32, True), ("auto", 31, False), ("auto", 1, False), ("always", 5, True), ("never", 32, False)],
)
def test_which_queries_are_causal(causal, count, expected):
    net, context, queries = qformer(causal=causal), torch.randn(1, 5, 16), torch.randn(1, count, 24)
    changed = queries.clone()
    changed[:, -1] += torch.randn(24)
    reaches = not torch.equal(net(queries, context)[:, 0], net(changed, context)[:, 0])
    assert reaches is (not expected)


def test_a_text_as_long_as_the_queries_is_not_causal():
    net, ids = qformer(), torch.randint(0, 9, (1, 32), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % 9
    assert not torch.allclose(net(ids=ids)[:, 0], net(ids=changed)[:, 0])


def test_padding_is_never_seen():
    net, context, queries = qformer(), torch.randn(1, 5, 16), torch.randn(1, 32, 24)
    ids, live = torch.randint(1, 9, (1, 6)), torch.tensor([[True] * 4 + [False] * 2])
    other = ids.where(live, 0)
    for q, c in ((None, None), (queries, context)):
        first, second = (net(q, c, one, live) for one in (ids, other))
        torch.testing.assert_close(first[:, :-2], second[:, :-2], rtol=0, atol=0)
        torch.testing.assert_close(first[:, :-2], net(q, c, ids[:, :4], live[:, :4]), rtol=1e-5, atol=1e-6)


def reached(net, count, length, **arguments):
    """(T, T) bool: which rows a change of each column reaches in one layer."""
    context, queries = torch.randn(1, 5, 16), torch.randn(1, count, 24)
    ids = torch.randint(0, 8, (1, length), generator=torch.Generator().manual_seed(1))
    live, rows = torch.ones(1, length, dtype=torch.bool), []
    before = net(queries, context, ids, live, **arguments)[0]
    for column in range(count + length):
        changed, words = queries.clone(), ids.clone()
        if column < count:
            changed[:, column] += torch.randn(24)
        else:
            words[:, column - count] += 1
        rows.append((net(changed, context, words, live, **arguments)[0] != before).any(-1))
    return torch.stack(rows, dim=1)


def test_queries_and_text_in_one_sequence():
    """Queries other than 32 are not causal with a text either, and text sees queries and is seen by them."""
    assert reached(qformer(depth=1), 5, 3).all()
    mixed = reached(qformer(depth=1, causal="always"), 5, 3)
    assert torch.equal(mixed[:5, :5], torch.ones(5, 5, dtype=torch.bool).tril())
    assert mixed[5:].all()
    assert mixed[:, 5:].all()


def test_the_mask_of_captioning():
    """A word sees queries and earlier words; queries see all queries and no word."""
    seen = reached(qformer(depth=1), 32, 3, decoder=True)
    assert seen[:32, :32].all()
    assert not seen[:32, 32:].any()
    assert seen[32:, :32].all()
    assert torch.equal(seen[32:, 32:], torch.ones(3, 3, dtype=torch.bool).tril())
    causal = reached(qformer(depth=1), 32, 3, decoder=True, causal=True)
    assert torch.equal(causal[:32, :32], torch.ones(32, 32, dtype=torch.bool).tril())
    assert torch.equal(causal[32:], seen[32:])


def test_how_often_queries_read_the_image():
    layers = [layer.cross_attn is not None for layer in qformer(depth=7, cross_every=3).layers]
    assert layers == [True, False, False, True, False, False, True]


def test_fresh_query_layers_are_those_of_text():
    for layer in qformer().layers:
        assert all(
            torch.equal(a, b) for a, b in zip(layer.query_mlp.parameters(), layer.text_mlp.parameters(), strict=True)
        )


def test_dropout_is_where_bert_has_it():
    net, x = qformer(dropout=0.5).train(), torch.randn(1, 32, 24)
    assert not torch.equal(net(x, torch.randn(1, 5, 16)), net(x, torch.randn(1, 5, 16)))
    assert (
        sum(isinstance(m, torch.nn.Dropout) for m in net.modules()) == 1 + 2 * 3 + 2 + 3
    )  # embedding, MLPs, attention
    assert make().encoder_norm.eps == 1e-5
    assert {m.eps for m in net.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-12}


# Files


def theirs(tokenizer):
    return published.to_published(tokenizer.state_dict(), tokenizer.config)


def load(folder, state, monkeypatch, **changes):
    """What the registry makes of a state dict of the authors, for a name with these sizes."""
    torch.save(state, folder / "authors.pt")
    preset = zoo.Preset(SeedTokenizer, SeedConfig(**SIZES), "for a test")
    monkeypatch.setitem(zoo.registry.tokenizers._registered, "small-seed", preset)
    return zoo.load_tokenizer("small-seed", folder / "authors.pt", **changes)


def test_published_names_there_and_back(tmp_path, monkeypatch):
    tokenizer = make()
    loaded = load(tmp_path, theirs(tokenizer), monkeypatch)
    assert loaded.config == tokenizer.config
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in tokenizer.state_dict().items())


def test_files_may_lack_a_text_side_and_the_branch_of_queries(tmp_path, monkeypatch):
    tokenizer = make()
    extra = {"Qformer.cls.predictions.bias": torch.zeros(3), "itm_head.weight": torch.zeros(2, 2)}
    state = {n: t for n, t in theirs(tokenizer).items() if not n.startswith(("blocks.", "pos_embed", "text_proj"))}
    state |= extra | {"pos_embed_image": tokenizer.pos_embed_image}
    loaded = load(tmp_path, state, monkeypatch)
    assert not loaded.config.retrieval
    assert not loaded.config.qformer.vocab_size
    tokens = tokenizer.encode(images())
    assert torch.equal(loaded.encode(images()).ids["image"], tokens.ids["image"])
    torch.testing.assert_close(loaded.decode(tokens), tokenizer.decode(tokens))
    with pytest.raises(ZooError, match="no text side"):
        loaded.encode_text(["a cube"])
    with pytest.raises(ZooError, match="without the branch that gives queries back"):
        loaded.features(images())
    assert loaded.features(images(), quantized=False).shape == (2, 32, 24)


def test_a_file_decides_its_head(tmp_path, monkeypatch):
    tokenizer = make(head=HeadConfig("qformer", 20, depth=2))
    state = theirs(tokenizer)
    # the published head is as wide as a name says, and its depth and kind are those of the file
    loaded = load(tmp_path, state, monkeypatch)
    assert (loaded.config.head.kind, loaded.config.head.depth) == ("qformer", 2)
    torch.testing.assert_close(loaded.reconstruct(images()), tokenizer.reconstruct(images()))


def test_a_part_that_is_missing_in_part_is_named(tmp_path, monkeypatch):
    state = theirs(make())
    del state["decode_task_layer.0.weight"]
    with pytest.raises(ZooError, match=r"1 missing \(decode_task.0.weight\); nothing was loaded"):
        load(tmp_path, state, monkeypatch)


def test_stage_files_become_one(tmp_path, monkeypatch):
    tokenizer = make()
    state = theirs(tokenizer)
    tower = {n.removeprefix("visual_encoder."): t for n, t in state.items() if n.startswith("visual_encoder.")}
    depth = tokenizer.config.encoder.depth
    tower |= {n.replace(f"blocks.{depth - 1}.", f"blocks.{depth}."): t for n, t in tower.items()} | {
        "norm.weight": torch.ones(16)
    }
    of_queries = ("Qformer", "query_tokens", "ln_vision", "vision_proj", "text_proj", "temp")
    first = {n: t for n, t in state.items() if n.startswith(of_queries)}
    second = {n: t for n, t in state.items() if not n.startswith((*of_queries, "visual_encoder"))}
    for name, content in (("eva", tower), ("1", {"model": first}), ("2", {"model": second})):
        torch.save(content, tmp_path / f"{name}.pth")
    preset = zoo.Preset(SeedTokenizer, SeedConfig(**SIZES), "for a test")
    monkeypatch.setitem(zoo.registry.tokenizers._registered, "small-seed", preset)
    files = [tmp_path / f"{name}.pth" for name in ("eva", "1", "2")]

    whole, fresh = merge(files, "small-seed", text=True)
    assert fresh == []
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in tokenizer.state_dict().items())
    start, fresh = merge(files[:2], "small-seed", text=True)
    assert {"encode_task", "quantizer", "head", "blocks"} <= set(fresh)
    assert torch.equal(start.query_tokens, tokenizer.query_tokens)
    with pytest.raises(ZooError, match="missing"):
        merge(files[1:], "small-seed", text=True)


def test_position_embeddings_of_another_grid_are_resampled():
    from zoo.tokenizers.seed.merge import fitted

    grid = torch.linspace(0, 1, 6).expand(6, 6)
    stored = torch.cat([torch.full((1, 1, 1), 9.0), grid.reshape(1, 36, 1)], dim=1)
    found = fitted({"visual_encoder.pos_embed": stored}, SeedConfig(**SIZES))["visual_encoder.pos_embed"]
    wanted = F.interpolate(grid[None, None], (4, 4), mode="bicubic", align_corners=False).reshape(1, 16, 1)
    assert found[0, 0] == 9
    torch.testing.assert_close(found[:, 1:], wanted)


def test_a_file_of_the_zoo_keeps_all_sizes(tmp_path):
    tokenizer = zoo.create_tokenizer("seed-tiny", codebook_size=64, head={"kind": "qformer", "depth": 1}, decoder="")
    zoo.save_tokenizer(tokenizer, tmp_path / "one.safetensors")
    loaded = zoo.load_tokenizer("seed-tiny", tmp_path / "one.safetensors")
    assert loaded.config == tokenizer.config


def test_parameters_at_published_sizes():
    """Section 6 of the published sizes, in millions: tower, Q-Former, one branch, and all."""
    with torch.device("meta"):
        tokenizer = zoo.create_tokenizer("seed-2")
    count = lambda *parts: sum(p.numel() for part in parts for p in part.parameters()) / 1e6  # noqa: E731
    assert count(tokenizer.encoder) == pytest.approx(985.9, abs=0.1)
    assert count(tokenizer.qformer) == pytest.approx(105.1, abs=0.1)
    assert count(tokenizer.blocks) == pytest.approx(28.35, abs=0.01)
    assert count(tokenizer.head) == pytest.approx(1.28, abs=0.01)
    assert count(tokenizer) == pytest.approx(1150.0, abs=0.1)


# Wrong input


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(1, 31, dtype=torch.int64), r"has 32 ids, \(B, 32\), got shape \(1, 31\)"),
        (torch.zeros(1, 33, dtype=torch.int64), r"got shape \(1, 33\)"),
        (torch.full((1, 32), 24), r"are 0\.\.23, got values from 24 to 24"),
        (torch.full((1, 32), -1), r"got values from -1 to -1"),
        (torch.zeros(1, 32, 2, dtype=torch.int64), r"are \(B, N\), got shape \(1, 32, 2\)"),
    ],
)
@pytest.mark.parametrize("method", ["decode", "features_of", "embedding_of", "decode_embedding"])
def test_ids_that_are_no_image(ids, message, method):
    with pytest.raises(ZooError, match=message):
        getattr(make(), method)(Tokens({"image": ids}))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (images(size=40), "of 32 x 32 pixels, got 40 x 40; resize"),
        (images() * 255, r"in \[0, 1\], got values from"),
        (images() - 1, r"in \[0, 1\], got values from"),
        ((images() * 255).byte(), "got torch.uint8; for bytes use"),
        (images()[0], r"got shape \(3, 32, 32\)"),
        (images()[:, :1], r"got shape \(2, 1, 32, 32\)"),
        (torch.full((1, 3, 32, 32), float("nan")), "got values from nan"),
    ],
)
def test_images_of_another_form(batch, message):
    for method in ("encode", "features", "encode_image"):
        with pytest.raises(ZooError, match=message):
            getattr(make(), method)(batch)


def test_texts_of_another_form():
    tokenizer = make()
    with pytest.raises(ZooError, match="a text of 9 tokens is longer than the 8 that are read"):
        tokenizer.encode_text(["a a a a a a a a"])
    with pytest.raises(ZooError, match="list of at least one text"):
        tokenizer.encode_text("a cube")


def test_settings_of_a_decoder_need_one():
    tokenizer = make()
    tokens = tokenizer.encode(images())
    with pytest.raises(ZooError, match="decodes to embeddings, which has no settings, got guidance"):
        tokenizer.decode(tokens, guidance=3.0)
    with pytest.raises(ZooError, match="got negative"):
        tokenizer.decode(tokens, negative=tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qformer": QFormerConfig(width=20, num_heads=2)}, "must be a multiple of decoder_heads 12"),
        ({"codebook_size": 0}, "must be at least 1"),
        ({"image_size": 4}, "below encoder.patch_size 8"),
        ({"text_length": 41}, "from 1 to qformer.max_positions 40"),
        ({"vocabulary": ("a", "b", "c")}, "must begin with <pad> <unk> <cls>"),
        ({"vocabulary": (*WORDS, "more")}, "vocab_size is 9, and the vocabulary has 10 words"),
    ],
)
def test_sizes_that_cannot_be(changes, message):
    with pytest.raises(ZooError, match=message):
        SeedConfig(**SIZES | changes)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (QFormerConfig, {"causal": "sometimes"}, "'auto', 'always' or 'never'"),
        (QFormerConfig, {"num_heads": 5}, "must be a multiple of num_heads 5"),
        (QFormerConfig, {"dropout": 1.0}, r"must be in \[0, 1\)"),
        (QFormerConfig, {"cross_every": 0}, "at least 1"),
        (EVAConfig, {"num_heads": 5}, "must be a multiple of num_heads 5"),
        (HeadConfig, {"kind": "linear"}, "'mlp' or 'qformer'"),
        (HeadConfig, {"num_queries": 2}, "makes one vector"),
    ],
)
def test_parts_that_cannot_be(kind, changes, message):
    with pytest.raises(ZooError, match=message):
        kind(**changes)


def test_weights_of_another_system_are_refused(tmp_path):
    weights.save(tmp_path / "other.safetensors", {"a": torch.zeros(1)}, {"system": "karl", "config": {}, "name": "x"})
    with pytest.raises(ZooError, match="holds the system 'karl'"):
        zoo.load_tokenizer("seed-tiny", tmp_path / "other.safetensors")

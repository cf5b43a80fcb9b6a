"""What DualToken promises beyond the numbers of the reference."""

import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo import Tokens, ZooError, weights
from zoo.tokenizers.dualtoken import published
from zoo.tokenizers.dualtoken.tokenizer import (
    DualTokenConfig,
    DualTokenTokenizer,
    PixelDecoderConfig,
    StreamConfig,
)
from zoo.tokenizers.siglip.encoder import PAD, UNKNOWN, SigLIPConfig

TOWERS = SigLIPConfig(
    image_size=32, patch_size=8, width=32, depth=3, num_heads=2, text_width=32, text_depth=1, text_heads=2,
    text_length=6, vocab_size=8, text_tokenizer="",
    vocabulary=(PAD, UNKNOWN, "a", "red", "blue", "cube", "ring", "two"),
)  # fmt: skip
DECODER = PixelDecoderConfig(
    image_size=32, channels=8, multipliers=(1, 1, 2, 2), num_blocks=0, embed_dim=16, attention=(4,), norm_groups=8
)
SIZES = {
    **{"image_size": 32, "encoder": TOWERS, "layer_pixel": 2, "layer_shortcut": 1, "layer_semantic": 2},
    **{"embed_dim": 8, "semantic": StreamConfig(16, 3, kind="rq_ema"), "pixel": StreamConfig(24, 2)},
    "decoder": DECODER,
}
ONE = {"one_codebook": True, "layer_pixel": 0}


def make(**changes):
    torch.manual_seed(0)
    tokenizer = DualTokenTokenizer(DualTokenConfig(**SIZES | changes))
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return tokenizer.eval()


def images(count=2, size=32):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(5))


def test_tokens_of_the_two_streams():
    tokenizer = make()
    tokens = tokenizer.encode(images())
    assert {name: tuple(ids.shape) for name, ids in tokens.ids.items()} == {"semantic": (2, 16, 3), "pixel": (2, 16, 2)}
    assert tokens.grid == (4, 4)
    assert tokenizer.decode(tokens).shape == (2, 3, 32, 32)
    assert tokenizer.features(images()).shape == (2, 16, 32)
    assert tokenizer.info.codebook_sizes == {"semantic": 16, "pixel": 24}


def test_a_batch_equals_its_images_one_by_one():
    tokenizer, batch = make(), images(3)
    tokens = tokenizer.encode(batch)
    decoded, features = tokenizer.decode(tokens), tokenizer.features(batch)
    for i in range(3):
        alone = tokenizer.encode(batch[i : i + 1])
        assert all(torch.equal(ids, tokens[i].ids[name]) for name, ids in alone.ids.items())
        torch.testing.assert_close(tokenizer.decode(alone), decoded[i : i + 1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tokenizer.features(batch[i : i + 1]), features[i : i + 1], rtol=1e-4, atol=1e-5)


def test_pixels_need_the_pixel_stream_alone_and_meaning_the_semantic_one():
    tokenizer = make()
    tokens = tokenizer.encode(images())
    pixel, semantic = (Tokens({name: tokens.ids[name]}) for name in ("pixel", "semantic"))
    assert torch.equal(tokenizer.decode(pixel), tokenizer.decode(tokens))
    torch.testing.assert_close(tokenizer.features_of(semantic), tokenizer.features(images()))
    torch.testing.assert_close(tokenizer.embedding_of(semantic), tokenizer.encode_image(images()))
    with pytest.raises(ZooError, match="needs ids of stream 'pixel', got streams \\['semantic'\\]"):
        tokenizer.decode(semantic)
    with pytest.raises(ZooError, match="needs ids of stream 'semantic', got streams \\['pixel'\\]"):
        tokenizer.features_of(pixel)


def test_features_are_what_the_pooled_embedding_is_taken_from():
    tokenizer = make()
    with torch.no_grad():
        pooled = tokenizer.encoder.vision.attn_pool(tokenizer.features(images()))
    torch.testing.assert_close(F.normalize(pooled, dim=-1), tokenizer.encode_image(images()))


def test_texts_are_compared_with_quantised_images():
    tokenizer = make()
    scores = tokenizer.similarity(images(), ["a red cube", "two ring", "blue"])
    own = tokenizer.encoder
    expected = own.logits(tokenizer.encode_image(images()), own.encode_text(["a red cube", "two ring", "blue"]))
    torch.testing.assert_close(scores, expected)
    with pytest.raises(ZooError, match="a text of 7 tokens is longer than the 6 that are read"):
        tokenizer.encode_text(["a red cube a red cube a"])


def test_fewer_levels_are_a_coarser_image():
    tokenizer = make()
    tokens, coarse = tokenizer.encode(images()), tokenizer.encode(images(), levels=1)
    assert torch.equal(coarse.ids["pixel"], tokens.ids["pixel"][..., :1])
    assert tokenizer.decode(coarse).shape == (2, 3, 32, 32)
    both = tokenizer.encode(images(), levels=3)  # of the pixel stream there are two
    assert torch.equal(both.ids["pixel"], tokens.ids["pixel"])
    for levels in (0, 4, 1.0, True):
        with pytest.raises(ZooError, match="encodes with 1 to 3 levels"):
            tokenizer.encode(images(), levels=levels)


def test_code_embeddings_are_what_a_language_model_reads():
    tokenizer = make()
    tokens = tokenizer.encode(images())
    codes = tokenizer.code_embeddings(tokens)
    assert {name: tuple(one.shape) for name, one in codes.items()} == {
        "semantic": (2, 16, 3, 8),
        "pixel": (2, 16, 2, 8),
    }
    with torch.no_grad():
        decoded = (tokenizer.to_values(codes["pixel"].sum(2)) + 1) / 2
    torch.testing.assert_close(decoded.clamp(0, 1), tokenizer.decode(tokens))


def test_a_token_of_a_language_model_depends_on_earlier_ones_alone():
    tokenizer = make()
    tokens = tokenizer.encode(images())
    changed = tokens.ids["pixel"].clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 24
    with torch.no_grad():
        one, other = (
            tokenizer.postquant_pixel(tokenizer.quantizers["pixel"].codes(i)) for i in (tokens.ids["pixel"], changed)
        )
    torch.testing.assert_close(one[:, :10], other[:, :10])
    assert ((one - other)[:, 10:].abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize(("layer_pixel", "reads"), [(0, {2}), (1, {1, 2})])
def test_one_codebook_serves_both_tasks(layer_pixel, reads):
    tokenizer = make(one_codebook=True, layer_pixel=layer_pixel, layer_shortcut=0)
    tokens = tokenizer.encode(images())
    assert {name: tuple(ids.shape) for name, ids in tokens.ids.items()} == {"image": (2, 16, 3)}
    assert tokenizer.decode(tokens).shape == (2, 3, 32, 32)
    torch.testing.assert_close(tokenizer.features_of(tokens), tokenizer.features(images()))
    taken, tower = [], tokenizer.encoder.vision
    run = tower.layers
    tower.layers = lambda h, start=0, stop=None: taken.append(stop) or run(h, start, stop)
    tokenizer.encode(images())
    assert reads <= set(taken)


def test_tokens_that_are_not_its_own_are_refused():
    tokenizer = make()
    ids = tokenizer.encode(images()).ids
    for stream, wrong, message in (
        ("pixel", ids["pixel"][..., 0], r"'pixel' of custom are \(B, N, up to 2\), got shape \(2, 16\)"),
        ("pixel", ids["semantic"], r"are \(B, N, up to 2\), got shape \(2, 16, 3\)"),
        ("pixel", ids["pixel"][..., :0], r"got shape \(2, 16, 0\)"),
        ("pixel", ids["pixel"] + 24, "are 0..23, got values from"),
        ("pixel", ids["pixel"] - 24, "are 0..23, got values from"),
        ("pixel", ids["pixel"][:, :9], r"are \(B, 16, up to 2\), one row for each patch"),
        ("semantic", ids["semantic"] + 16, "'semantic' of custom are 0..15"),
    ):
        kept = {name: one[:, : wrong.shape[1]] for name, one in ids.items()}
        with pytest.raises(ZooError, match=message):
            tokenizer.decode(Tokens(kept | {stream: wrong}))
    with pytest.raises(ZooError, match="has streams semantic, pixel, got ids of 'image'"):
        tokenizer.decode(Tokens(ids | {"image": ids["pixel"]}))


def test_ids_are_checked_at_each_level_where_codebooks_differ():
    tokenizer = make(pixel=StreamConfig((8, 24), 2, shared=False))
    ids = torch.zeros(1, 16, 2, dtype=torch.int64)
    ids[..., 1] = 20
    assert tokenizer.decode(Tokens({"pixel": ids})).shape == (1, 3, 32, 32)
    with pytest.raises(ZooError, match=r"below \[8, 24\] at its levels"):
        tokenizer.decode(Tokens({"pixel": ids.flip(2)}))


@pytest.mark.parametrize("size", [24, 40])
def test_images_of_another_size_are_refused(size):
    with pytest.raises(ZooError, match=f"of 32 x 32 pixels, got {size} x {size}; resize"):
        make().encode(images(size=size))


def test_sizes_that_do_not_fit_are_refused():
    for changes, message in (
        ({"layer_semantic": 4}, "1 <= layer_semantic <= 3"),
        ({"layer_pixel": 3}, "1 <= layer_pixel <= layer_semantic"),
        ({"layer_pixel": 0}, "1 <= layer_pixel"),
        ({"layer_shortcut": 3}, "0 <= layer_shortcut"),
        ({"embed_dim": 12}, "embed_dim 12 must divide"),
        ({"image_size": 64}, "image_size is 64, its encoder takes 32 and its decoder makes 32 pixels of 4 places"),
    ):
        with pytest.raises(ZooError, match=message):
            DualTokenConfig(**SIZES | changes)


def test_the_authors_row_of_padding_is_never_chosen():
    """It is a code of zeros, and so the nearest one to vectors near zero."""
    tokenizer = make()
    state = published.to_published(tokenizer.state_dict(), tokenizer.config)
    assert state["quantizer_pix.codebooks.1.weight"].shape == (25, 8)
    loaded = make()
    weights.load(loaded, published.from_published(state, loaded.config))
    assert loaded.quantizers["pixel"].encode(torch.zeros(5, 8)).max() < 24
    assert torch.equal(loaded.encode(images()).ids["pixel"], tokenizer.encode(images()).ids["pixel"])


def test_checkpoints_under_the_earlier_names_load(tmp_path):
    tokenizer = zoo.create_tokenizer("dualtoken-tiny")
    state = published.to_published(tokenizer.state_dict(), tokenizer.config)
    older = {}
    for name, tensor in state.items():
        head, _, rest = name.partition(".")
        older[".".join([head.replace("_sem", "_semantic").replace("_pix", "_pixel"), rest])] = tensor
    assert "quantizer_pixel.codebooks.3.weight" in older
    torch.save({"epoch": 3, "name": "run", "state_dict": older, "optimizer": {}}, tmp_path / "epoch_3.pt")
    loaded = zoo.load_tokenizer("dualtoken-tiny", weights=tmp_path / "epoch_3.pt")
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, tokenizer.state_dict()[name]), name


def test_a_shared_table_is_stored_once():
    names = [name for name in make().state_dict() if name.startswith("quantizers.pixel")]
    assert names == [f"quantizers.pixel.codebooks.0.{name}" for name in ("codebook", "cluster_size", "embed_sum")]


def test_a_saved_tokenizer_of_other_sizes_loads_by_the_name(tmp_path):
    tokenizer = zoo.create_tokenizer("dualtoken-tiny", one_codebook=True, layer_pixel=0, semantic={"levels": 8})
    zoo.save_tokenizer(tokenizer, tmp_path / "one.safetensors")
    loaded = zoo.load_tokenizer("dualtoken-tiny", weights=tmp_path / "one.safetensors")
    assert loaded.config == tokenizer.config
    assert loaded.info.levels == {"image": 8}


def test_everything_runs_in_bfloat16():
    tokenizer = make().to(torch.bfloat16)
    assert tokenizer.reconstruct(images()).dtype == torch.bfloat16
    assert tokenizer.features(images()).dtype == torch.bfloat16
    assert tokenizer.encode_image(images()).dtype == torch.bfloat16


def test_it_compiles_to_the_same_ids():
    tokenizer = make()
    values = 2 * images() - 1
    with torch.no_grad():
        expected = tokenizer(values)
        found = torch.compile(tokenizer, backend="eager")(values)
    assert all(torch.equal(one.ids, expected.quantized[name].ids) for name, one in found.quantized.items())

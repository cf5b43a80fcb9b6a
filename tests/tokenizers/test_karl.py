"""What KARL promises beyond the numbers of the reference."""

import pytest
import torch
from karl_helpers import SIZES, make

import zoo
from zoo import Tokens, ZooError, registry, weights
from zoo.tokenizers.karl import published
from zoo.tokenizers.karl.tokenizer import QUALITY_BINS, KarlConfig, gather_live, halting_mask, spread


@pytest.fixture(
    params=["karl-small-vqgan", "karl-small-vqgan-continuous", "karl-small-vae", "karl-small-vae-continuous"]
)
def tokenizer(request):
    return make(request.param)


def images(count=3, width=32):
    """Images that differ in their contrast."""
    noise = torch.rand(count, 3, 32, width, generator=torch.Generator().manual_seed(5))
    return (0.5 + torch.linspace(0.1, 1, count).view(-1, 1, 1, 1) * (noise - 0.5)).clamp(0, 1)


SETTINGS = {"sample_posterior": False}


def test_a_batch_equals_its_images_one_by_one(tokenizer):
    batch = images()
    tokens = tokenizer.encode(batch, **SETTINGS)
    assert len(set(tokens.lengths.tolist())) > 1, "the test needs images of different lengths"
    decoded = tokenizer.decode(tokens)
    for i in range(len(batch)):
        alone = tokenizer.encode(batch[i : i + 1], **SETTINGS)
        assert torch.equal(alone.mask, tokens[i].mask)
        if tokens.ids:
            assert torch.equal(alone.ids["image"], tokens[i].ids["image"])
        else:
            torch.testing.assert_close(alone.latents["image"], tokens[i].latents["image"], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(tokenizer.decode(alone), decoded[i : i + 1], rtol=1e-3, atol=1e-4)


def test_decoding_live_tokens_alone_equals_masking_the_others(tokenizer):
    tokens = tokenizer.encode(images(), **SETTINGS)
    assert 0 < tokens.lengths.min() < tokens.mask.shape[1]
    latents = tokenizer.quantizer.codes(tokens.ids["image"]) if tokens.ids else tokens.latents["image"]
    with torch.no_grad():
        output = tokenizer.decoder(latents, (8, 8), mask=halting_mask(tokens.mask, 64)[:, None])
        masked = tokenizer.decode_code(tokenizer.code_map(output, (8, 8))).clamp(0, 1)
    torch.testing.assert_close(tokenizer.decode(tokens), masked, rtol=1e-4, atol=1e-5)


def test_what_a_dropped_token_holds_does_not_matter():
    tokenizer = make()
    tokens = tokenizer.encode(images())
    other = Tokens(ids={"image": tokens.ids["image"].where(tokens.mask, 3)}, mask=tokens.mask)
    assert torch.equal(tokenizer.decode(tokens), tokenizer.decode(other))


def test_survivors_are_gathered_in_order_with_their_slots():
    mask = torch.tensor([[False, True, False, True], [True, False, False, False]])
    latents = torch.arange(8.0).view(2, 4, 1)
    gathered, slots, live = gather_live(latents, mask)
    assert slots[live].tolist() == [1, 3, 0]
    assert gathered[live].flatten().tolist() == [1, 3, 4]
    assert live.tolist() == [[True, True], [True, False]]


def test_images_without_any_token_are_decoded_too():
    tokenizer = make()
    ids = torch.zeros(2, 64, dtype=torch.int64)
    some = torch.zeros(2, 64, dtype=torch.bool)
    some[1, :5] = True
    decoded = tokenizer.decode(Tokens(ids={"image": ids}, mask=some))
    none = tokenizer.decode(Tokens(ids={"image": ids[:1]}, mask=some[:1]))
    torch.testing.assert_close(none, decoded[:1], rtol=1e-4, atol=1e-5)


def test_an_error_takes_the_first_bin_that_is_not_below_it():
    tokenizer = make()
    errors = torch.tensor([0.0, 0.005, 0.0051, 0.05, 0.08, 0.38, 0.5])
    assert tokenizer.quality_bin(errors).tolist() == [0, 0, 1, 5, 8, 18, 18]
    for value in QUALITY_BINS:
        assert QUALITY_BINS[tokenizer.quality_bin(torch.tensor(value))] == value
    tokenizer.to(torch.bfloat16)
    assert tokenizer.quality_bin(errors).tolist() == [0, 0, 1, 5, 8, 18, 18]


def test_quality_is_one_number_or_one_for_each_image():
    tokenizer, batch = make(), images(2)
    each = tokenizer.encode(batch, quality=torch.tensor([0.02, 0.2]))
    for i, quality in enumerate((0.02, 0.2)):
        alone = tokenizer.encode(batch, quality=quality)[i]
        assert torch.equal(alone.ids["image"], each[i].ids["image"])
        assert torch.equal(alone.mask, each[i].mask)
    default = tokenizer.encode(batch)
    assert torch.equal(default.ids["image"], tokenizer.encode(batch, quality=0.05).ids["image"])
    tokenizer.encode(batch, quality=0)  # an integer is a number


def test_a_ceiling_limits_and_a_count_is_exact():
    tokenizer, batch = make(), images(2)
    ceiling = tokenizer.encode(batch, max_tokens=13)
    assert ceiling.mask.shape == (2, 13)
    exact = tokenizer.encode(batch, num_tokens=13)
    assert exact.lengths.tolist() == [13, 13]
    assert torch.equal(exact.ids["image"], ceiling.ids["image"])
    assert tokenizer.decode(exact).shape == (2, 3, 32, 32)


def test_a_target_error_is_searched_for_each_image():
    tokenizer, batch = make(), images(4)
    errors = []
    for value in QUALITY_BINS:
        decoded = tokenizer.decode(tokenizer.encode(batch, quality=value))
        errors.append((decoded - batch).abs().flatten(1).mean(1))
    errors = torch.stack(errors)  # (bins, B)
    for target in (0.16, errors.median().item(), errors.min().item()):
        found = tokenizer.encode(batch, target_error=target)
        start = int(tokenizer.quality_bin(torch.tensor(target)))
        for i in range(len(batch)):
            tried = list(range(start, -1, -1))
            chosen = next((b for b in tried if errors[b, i] <= target), min(tried, key=lambda b, i=i: errors[b, i]))
            expected = tokenizer.encode(batch, quality=QUALITY_BINS[chosen])[i]
            assert torch.equal(found[i].mask, expected.mask)
            assert torch.equal(found[i].ids["image"], expected.ids["image"])


def test_images_twice_as_wide_are_taken_and_others_are_not(tokenizer):
    wide = images(2, 64)
    assert tokenizer.reconstruct(wide).shape == wide.shape
    with pytest.raises(ZooError, match="32 x 32 or 32 x 64 pixels, got 32 x 40"):
        tokenizer.encode(images(1, 40))


def test_the_posterior_is_sampled_unless_its_mean_is_asked_for():
    tokenizer = make("karl-small-vae-continuous")
    first, second = (tokenizer.encode(images(1)).latents["image"] for _ in range(2))
    assert not torch.equal(first, second)
    first, second = (tokenizer.encode(images(1), **SETTINGS).latents["image"] for _ in range(2))
    assert torch.equal(first, second)


def test_a_number_of_tokens_that_is_no_multiple_of_anything_survives_bfloat16():
    tokenizer = make().to(torch.bfloat16)
    tokens = tokenizer.encode(images(2), num_tokens=7)
    assert tokenizer.decode(tokens).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"quality": 0.5}, r"from 0 to 0.38 \(learned range\), got 0.5"),
        ({"quality": -0.1}, r"from 0 to 0.38 \(learned range\), got -0.1"),
        ({"quality": float("nan")}, "got nan"),
        ({"quality": "high"}, "a number or a tensor .*, got 'high'"),
        ({"quality": torch.tensor([0.1, 0.2, 0.3])}, r"one or one for each of 2 images, got shape \(3,\)"),
        ({"max_tokens": 97}, "max_tokens .* from 1 to its 96 slots, got 97"),
        ({"num_tokens": 0}, "num_tokens .* from 1 to its 96 slots, got 0"),
        ({"num_tokens": 2.5}, "is an integer .* got 2.5"),
        ({"num_tokens": 3, "max_tokens": 4}, "not both"),
        ({"target_error": 0.1, "quality": 0.2}, "leave quality= and num_tokens= out"),
        ({"target_error": 2.0}, "target_error .* got 2"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, complaint):
    with pytest.raises(ZooError, match=complaint):
        make().encode(images(2), **settings)


def test_slots_that_were_never_trained_are_warned_of():
    with pytest.warns(UserWarning, match="trained with up to 92 tokens"):
        make().encode(images(1), max_tokens=93)


def test_more_positions_than_slots_are_not_decoded():
    with pytest.raises(ZooError, match="has 96 slots for tokens, got 97 positions"):
        make().decode(Tokens(ids={"image": torch.zeros(1, 97, dtype=torch.int64)}))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"encoder_heads": 3}, "encoder_width 1024 is no multiple of encoder_heads 3"),
        ({"encoder_width": 256}, "must be above the base's embed_dim 256"),
        ({"max_tokens": 400}, "max_tokens <= trained_slots <= num_slots"),
        ({"quality_bins": (0.1, 0.05)}, "in rising order"),
        ({"quality": 0.5}, "from 0 to 0.38, got 0.5"),
        ({"image_size": 100}, "image_size 100 is no multiple of 16"),
        ({"init": "random"}, "init must be 'published' or 'aligned', got 'random'"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes, complaint):
    with pytest.raises(ZooError, match=complaint):
        KarlConfig(**changes)


def test_files_are_read_back_and_those_of_another_base_or_kind_are_refused(tmp_path, tokenizer):
    name, path = tokenizer.info.name, tmp_path / "theirs.safetensors"
    weights.save(path, published.to_published(tokenizer.state_dict(), tokenizer.config))
    sizes = {"base": registry.config_fields(tokenizer.config)["base"], **SIZES}
    again = zoo.load_tokenizer(name, weights=path, **sizes)
    for key, tensor in tokenizer.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    other_base = name.replace("vqgan", "vae") if "vqgan" in name else name.replace("vae", "vqgan")
    with pytest.raises(ZooError, match=r"load it under a name with '(vqgan|vae)' in it"):
        zoo.load_tokenizer(other_base, weights=path)
    other_kind = name.removesuffix("-continuous") if "continuous" in name else f"{name}-continuous"
    with pytest.raises(ZooError, match=r"load it under a name (with|without) 'continuous' in it"):
        zoo.load_tokenizer(other_kind, weights=path, **sizes)

    zoo.save_tokenizer(tokenizer, tmp_path / "ours.safetensors")
    assert zoo.load_tokenizer(name, weights=tmp_path / "ours.safetensors").config == tokenizer.config
    with pytest.raises(ZooError, match=r"KarlConfig.base is a (VQGAN|KL)Config here, got a (VQGAN|KL)Config"):
        zoo.load_tokenizer(other_base, weights=tmp_path / "ours.safetensors")


def test_a_fresh_network_has_the_published_initialisation():
    tokenizer = zoo.create_tokenizer("karl-tiny-vqgan")
    encoder, decoder = tokenizer.encoder, tokenizer.decoder
    assert torch.equal(encoder.quality_embedding[3], torch.full((512,), 0.03))
    for table in (encoder.positions, encoder.latent_tokens, decoder.slot_positions, decoder.positions):
        assert table.std().item() == pytest.approx(512**-0.5, rel=0.02)
    qkv, proj = encoder.blocks[0].attn.qkv, decoder.blocks[0].attn.proj
    assert qkv.weight.abs().max().item() == pytest.approx((6 / (4 * 512)) ** 0.5, rel=1e-3)
    assert proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not any(p.any() for n, p in encoder.blocks.named_parameters() if n.endswith("bias") and "norm" not in n)
    assert tokenizer.quantizer.codebook.abs().max() <= 1 / 4096


def test_beginnings_of_the_spread_order_cover_the_grid():
    order = spread(8)
    assert sorted(order.tolist()) == list(range(64))
    rows, columns = order // 8, order % 8
    for count, reach in ((5, 4.3), (16, 2.3), (32, 1.5)):  # no place is farther than this from one of the first
        places = torch.stack([rows, columns], 1).float()
        assert torch.cdist(places, places[:count]).min(1).values.max() <= reach


def test_aligned_slots_read_their_place_from_the_start():
    batch = images(8)
    spreads = {}
    for init in ("published", "aligned"):
        torch.manual_seed(0)
        tokenizer = zoo.create_tokenizer("karl-tiny", init=init).eval()
        values = torch.nn.functional.interpolate(batch, (64, 64))
        with torch.no_grad():
            grid = tokenizer.encoder.grid_tokens(values, tokenizer.base_features(values))
            _, z = tokenizer.encoder(grid, torch.full((8,), 5), 64)
        spreads[init] = torch.nn.functional.normalize(z, dim=-1).std(0).mean().item()
    assert spreads["aligned"] > 5 * spreads["published"]

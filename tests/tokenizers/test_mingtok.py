"""What MingTok and its flow head promise beyond the numbers of the reference."""

import pytest
import torch

import zoo
from zoo import Tokens, ZooError, weights
from zoo.nn.transformer import SwiGLU
from zoo.tokenizers.mingtok import published
from zoo.tokenizers.mingtok.head import FlowHead, FlowHeadConfig
from zoo.tokenizers.mingtok.losses import normalize_patches, patch_loss, spread_mask
from zoo.tokenizers.mingtok.tokenizer import MingTokConfig, MingTokTokenizer

SIZES = {
    **{"image_size": 32, "patch_size": 8, "latent_dim": 4, "pixel_patch_size": 4, "head_dim": 16},
    **{f"{part}_{name}": n for part in ("encoder", "semantic", "pixel") for name, n in (("width", 32), ("depth", 2))},
    **{"latent_mean": 0.25, "latent_scale": 8.0},
}
HEAD_SIZES = {
    **{"latent_dim": 4, "hidden_size": 12, "feature_dim": 32, "condition_dim": 10, "width": 16},
    **{"depth": 2, "num_steps": 4},
}


def randomize(module, std):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn_like(parameter))
    return module.eval()


def make(**changes):
    return randomize(MingTokTokenizer(MingTokConfig(**SIZES | changes)), 0.2)


def make_head(std=0.2, **changes):
    return randomize(FlowHead(FlowHeadConfig(**HEAD_SIZES | changes)), std)


def images(count=2, height=32, width=32):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(5))


def conditions(count, rows=2):
    return torch.randn(count, rows, 10, generator=torch.Generator().manual_seed(6)).unbind()


def test_a_batch_equals_its_images_one_by_one():
    tokenizer, batch = make(), images(3)
    tokens, features = tokenizer.encode(batch), tokenizer.features(batch)
    decoded = tokenizer.decode(tokens)
    for i in range(3):
        alone = tokenizer.encode(batch[i : i + 1])
        torch.testing.assert_close(alone.latents["image"], tokens[i].latents["image"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tokenizer.features(batch[i : i + 1]), features[i : i + 1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tokenizer.decode(alone), decoded[i : i + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mlp", ["mlp", "swiglu"])
def test_features_of_tokens_are_those_of_their_image(mlp):
    tokenizer = make(encoder_mlp=mlp, semantic_mlp=mlp)
    batch = images(2, 24, 40)
    tokens = tokenizer.encode(batch)
    assert tokens.grid == (3, 5)
    features = tokenizer.features(batch)
    assert features.shape == (2, 15, 32)
    torch.testing.assert_close(tokenizer.features_of(tokens), features)
    torch.testing.assert_close(tokenizer.features_of(tokens.latents["image"]), features)


def test_the_latent_of_the_whole_image_is_seen_by_no_patch():
    tokenizer = make()
    with torch.no_grad():
        latents = tokenizer.encoder(tokenizer.to_values(images()))
        features = tokenizer.semantic_decoder(latents)
    assert latents.shape == (2, 17, 4)
    torch.testing.assert_close(features[:, :-1], tokenizer.features(images()))


def test_latents_of_the_contract_are_normalised():
    tokenizer = make()
    with torch.no_grad():
        raw = tokenizer.encoder(tokenizer.to_values(images()))[:, :-1]
    latents = tokenizer.encode(images()).latents["image"]
    torch.testing.assert_close(latents, (raw - 0.25) / 8)
    torch.testing.assert_close(tokenizer.denormalize(latents), raw)


def test_a_feature_depends_on_its_latent_and_on_earlier_ones_alone():
    tokenizer = make()
    latents = tokenizer.encode(images()).latents["image"]
    changed = latents.clone()
    changed[:, 6] += 0.3
    one, other = tokenizer.features_of(latents), tokenizer.features_of(changed)
    torch.testing.assert_close(one[:, :6], other[:, :6])
    assert ((one - other)[:, 6:].abs().amax(-1) > 1e-4).all()
    torch.testing.assert_close(tokenizer.features_of(latents[:, :6]), one[:, :6])


def test_token_by_token_equals_the_parallel_pass():
    tokenizer = make()
    latents = tokenizer.encode(images()).latents["image"]
    cache = tokenizer.new_cache(2)
    features = torch.stack([tokenizer.step(latent, cache) for latent in latents.unbind(1)], dim=1)
    torch.testing.assert_close(features, tokenizer.features_of(latents), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tokenizer.decode_features(features), tokenizer.decode(tokenizer.encode(images())))
    with pytest.raises(ZooError, match="the cache is full with 16 tokens"):
        tokenizer.step(latents[:, 0], cache)
    with pytest.raises(ZooError, match=r"takes latents \(2, 4\), got shape \(1, 4\)"):
        tokenizer.step(latents[:1, 0], tokenizer.new_cache(2))


def test_the_pixel_decoder_knows_no_positions():
    tokenizer = make(pixel_patch_size=8)
    features, order = tokenizer.features(images()), torch.randperm(16)
    with torch.no_grad():
        patches = tokenizer.pixel_decoder.patches(features)
        permuted = tokenizer.pixel_decoder.patches(features[:, order])
    torch.testing.assert_close(permuted, patches[:, order], rtol=1e-4, atol=1e-5)


def test_pixels_are_computed_in_float32_under_autocast():
    tokenizer, features = make(), make().features(images())
    with torch.autocast("cpu", torch.bfloat16):
        decoded = tokenizer.decode_features(features)
    assert torch.equal(decoded, tokenizer.decode_features(features))


def test_everything_runs_in_bfloat16():
    tokenizer = make().to(torch.bfloat16)
    cache = tokenizer.new_cache(2)
    assert tokenizer.step(tokenizer.encode(images()).latents["image"][:, 0], cache).dtype == torch.bfloat16
    assert tokenizer.reconstruct(images()).dtype == torch.bfloat16
    assert tokenizer.encode(images(1, 40, 24)).latents["image"].dtype == torch.bfloat16


def test_as_many_patches_in_another_shape_get_resized_positions():
    encoder = make().encoder
    assert torch.equal(encoder.positions(4, 4), encoder.pos_embed)
    wide = encoder.positions(2, 8)
    assert wide.shape == encoder.pos_embed.shape
    assert not torch.allclose(wide[:, :-1], encoder.pos_embed[:, :-1])
    assert torch.equal(wide[:, -1], encoder.pos_embed[:, -1])


def test_rows_of_positions_are_the_height():
    encoder = make().encoder
    with torch.no_grad():
        encoder.pos_embed[:, :-1] = torch.arange(4.0).repeat_interleave(4)[None, :, None]
    rows = encoder.positions(8, 4)[0, :-1, 0].view(8, 4)
    assert torch.allclose(rows[:, :1].expand(8, 4), rows)
    assert (rows[1:, 0] > rows[:-1, 0]).all()


def test_hidden_patches_leave_no_trace_but_their_place():
    tokenizer = make()
    token, mask = torch.randn(1, 1, 32), torch.zeros(2, 16, dtype=torch.bool)
    mask[0, 5] = mask[1, :8] = True
    values = tokenizer.to_values(images())
    changed = values.clone()
    changed[0, :, 8:16, 8:16] = 0.7  # patch 5
    changed[1, :, :16] = -0.7  # patches 0..7
    with torch.no_grad():
        encode = tokenizer.encoder
        hidden = encode(values, mask, token)
        assert torch.equal(encode(changed, mask, token), hidden)
        assert not torch.allclose(encode(values), hidden)
        assert torch.equal(encode(values, torch.zeros_like(mask), token), encode(values))
        mask[0, 5], mask[0, 6] = False, True
        assert not torch.allclose(encode(values, mask, token)[0], hidden[0])
    with pytest.raises(ZooError, match=r"a bool mask of \(2, 16\), got torch.bool \(2, 4\)"):
        encode(values, mask[:, :4], token)
    with pytest.raises(ZooError, match="and no mask_token"):
        encode(values, mask)


@pytest.mark.parametrize(
    ("latents", "grid", "complaint"),
    [
        (torch.zeros(1, 15, 4), None, "a square number of tokens in raster order such as 16, got 15 tokens"),
        (torch.zeros(1, 16, 4), (2, 8), "in raster order such as 16, got a grid of 2 x 8"),
        (torch.zeros(1, 16, 5), None, r"are \(B, N, 4\), got shape \(1, 16, 5\)"),
        (torch.full((4, 16, 4), 8.25), None, r"about 1 \(up to 4\), got 8.25; .* use tokenizer.normalize\(latents\)"),
        (torch.full((4, 16, 4), torch.nan), None, "got NaN"),
    ],
)
def test_latents_that_are_no_square_image_are_not_decoded(latents, grid, complaint):
    with pytest.raises(ZooError, match=complaint):
        make().decode(Tokens(latents={"image": latents}, grid=grid))


def test_any_square_of_normalised_latents_is_decoded():
    tokenizer = make()
    for side, std in ((4, 1.0), (6, 3.0), (4, 0.0)):
        decoded = tokenizer.decode(Tokens(latents={"image": std * torch.randn(2, side**2, 4)}))
        assert decoded.shape == (2, 3, 8 * side, 8 * side)


def test_a_scale_is_not_judged_by_a_few_values_or_without_statistics():
    assert make().features_of(torch.full((1, 8, 4), 9.0)).shape == (1, 8, 32)
    unknown = make(latent_mean=0.0, latent_scale=1.0)
    assert unknown.features_of(torch.full((4, 16, 4), 9.0)).shape == (4, 16, 32)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda tok: tok.encode(images(1, 32, 36)), "multiples of 8, got 32 x 36"),
        (lambda tok: tok.features(images(1, 31, 32)), "multiples of 8, got 31 x 32"),
        (lambda tok: tok.reconstruct(images(1, 16, 32)), "decodes square images"),
        (lambda tok: tok.decode_features(torch.zeros(1, 15, 32)), r"N a square number, got shape \(1, 15, 32\)"),
        (lambda tok: tok.decode_features(torch.zeros(1, 16, 31)), r"\(B, N, 32\) .* got shape \(1, 16, 31\)"),
    ],
)
def test_images_and_features_that_do_not_fit_are_refused(call, complaint):
    with pytest.raises(ZooError, match=complaint):
        call(make())


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"image_size": 36}, "image_size 36 is no multiple of patch_size 8"),
        ({"pixel_patch_size": 3}, "patch_size 8 is no multiple of pixel_patch_size 3"),
        ({"head_dim": 24}, "encoder_width 32 is no multiple of head_dim 24"),
        ({"latent_dim": 5}, "encoder_width 32 is no multiple of latent_dim 5"),
        ({"semantic_width": 30, "head_dim": 2}, "semantic_width 30 is no multiple of latent_dim 4"),
        ({"pixel_depth": 0}, "pixel_depth must be at least 1, got 0"),
        ({"semantic_mlp": "geglu"}, "semantic_mlp must be 'mlp' or 'swiglu', got 'geglu'"),
        ({"latent_scale": 0.0}, "a latent_scale above 0, got 0.25 and 0.0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes, complaint):
    with pytest.raises(ZooError, match=complaint):
        MingTokConfig(**SIZES | changes)


def test_a_swiglu_has_two_thirds_of_the_hidden_width():
    widths = {64: 176, 128: 344, 192: 512, 768: 2048, 1024: 2736}
    with torch.device("meta"):
        assert {width: SwiGLU(width, 4 * width).w3.in_features for width in widths} == widths


def test_a_fresh_tokenizer_has_the_initialisation_of_vision_transformers():
    tokenizer = zoo.create_tokenizer("mingtok-tiny")
    encoder = tokenizer.encoder
    for weight in (encoder.pos_embed, encoder.patch_embed.weight, tokenizer.semantic_decoder.blocks[1].mlp.w12.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    biases = [p for name, p in tokenizer.named_parameters() if name.endswith("bias")]
    assert not any(bias.any() for bias in biases)


def test_the_file_of_the_small_preset_stays_small():
    with torch.device("meta"):
        tokenizer = zoo.create_tokenizer("mingtok-tiny")
    assert 4 * sum(p.numel() for p in tokenizer.parameters()) < 16e6


@pytest.mark.parametrize("layout", ["plain", "nested", "univision", "bfloat16"])
def test_the_authors_files_load_in_their_layouts(tmp_path, layout):
    tokenizer = make()
    theirs = published.to_published(tokenizer.state_dict(), tokenizer.config)
    state = {
        "plain": theirs | {"target_backbone.blocks.0.weight": torch.ones(2)},
        "nested": {"model": theirs},
        "univision": {f"vision.{name}": t for name, t in theirs.items()} | {"model.word_embeddings": torch.ones(2)},
        "bfloat16": {name: t.bfloat16() for name, t in theirs.items()},
    }[layout]
    torch.save(state, tmp_path / "theirs.pt")
    loaded = zoo.load_tokenizer("mingtok-vision", weights=tmp_path / "theirs.pt", **SIZES)
    expected = tokenizer.to(torch.bfloat16).float() if layout == "bfloat16" else tokenizer
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    torch.save({"model": {k: v for k, v in theirs.items() if k != "sem_to_pix.bias"}}, tmp_path / "less.pt")
    with pytest.raises(ZooError, match=r"1 missing \(pixel_decoder.embed.bias\)"):
        zoo.load_tokenizer("mingtok-vision", weights=tmp_path / "less.pt", **SIZES)


def test_what_the_authors_leave_out_has_their_defaults():
    config = published.config_from_published(
        {"low_level_encoder": {"out_dim": 32}, "semantic_decoder": {"in_dim": 32}, "pixel_decoder": {}}
    )
    assert config == MingTokConfig(
        image_size=224,
        patch_size=16,
        encoder_width=1024,
        encoder_depth=24,
        encoder_mlp="mlp",
        semantic_depth=1,
        semantic_mlp="mlp",
        pixel_depth=1,
        latent_mean=0.0,
        latent_scale=1.0,
    )
    assert published.head_config_from_published({"num_sampling_steps": "8"}) == FlowHeadConfig(num_steps=8)


@pytest.mark.parametrize(
    ("semantic", "complaint"),
    [
        ({"in_dim": 16}, "must agree on patch_size and on out_dim = in_dim"),
        ({"in_dim": 32, "patch_size": 32}, "must agree on patch_size and on out_dim = in_dim"),
        ({"in_dim": 32, "ffn_layer": "geglu"}, "ffn_layer must be one of mlp, swiglu, swiglufused, got 'geglu'"),
    ],
)
def test_arguments_that_do_not_belong_together_are_refused(semantic, complaint):
    with pytest.raises(ZooError, match=complaint):
        published.config_from_published(
            {"low_level_encoder": {"out_dim": 32}, "semantic_decoder": semantic, "pixel_decoder": {}}
        )


def test_a_head_is_taken_out_of_a_language_model(tmp_path):
    head, fresh = make_head(), FlowHead(FlowHeadConfig(**HEAD_SIZES))
    theirs = published.head_to_published(head.state_dict(), head.config)
    others = {"model.word_embeddings.weight": torch.ones(2), "vision.sem_to_pix.bias": torch.ones(2)}
    weights.load(fresh, published.head_from_published(theirs | others, fresh.config))
    assert all(torch.equal(fresh.state_dict()[name], tensor) for name, tensor in head.state_dict().items())


def test_losses_see_visible_patches_alone():
    values, prediction = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 64, 48)
    mask = torch.rand(2, 16) < 0.5
    fine = spread_mask(mask, 64)
    assert torch.equal(fine.view(2, 8, 8)[:, ::2, 1::2].flatten(1), mask)
    changed = torch.where(fine[..., None], prediction + 5, prediction)
    for kind in ("L1-plain", "L1-tanh", "L2"):
        assert patch_loss(changed, values, 4, kind, mask=mask) == patch_loss(prediction, values, 4, kind, mask=mask)
    assert patch_loss(changed, values, 4) > patch_loss(prediction, values, 4)
    with pytest.raises(ZooError, match="no loss of patches is called 'l1-plain'; did you mean"):
        patch_loss(prediction, values, 4, "l1-plain")


def test_normalised_pixels_matter_to_the_squared_error_alone():
    values, prediction = torch.rand(1, 3, 8, 8) * 2 - 1, torch.randn(1, 4, 48)
    assert patch_loss(prediction, values, 4, "L2", norm_pix=True) != patch_loss(prediction, values, 4, "L2")
    assert patch_loss(prediction, values, 4, norm_pix=True) == patch_loss(prediction, values, 4)
    assert torch.equal(normalize_patches(torch.full((1, 4, 48), 0.5)), torch.zeros(1, 4, 48))
    nearly = torch.full((48,), 0.5)
    nearly[0] += 0.01
    assert normalize_patches(nearly).std().item() == pytest.approx((1 + 1e-6 / nearly.var().item()) ** -0.5, rel=1e-4)


def test_a_fresh_head_predicts_zero():
    head, (z,) = FlowHead(FlowHeadConfig(**HEAD_SIZES)), conditions(1)
    noise = torch.randn(2, 4)
    assert not head.velocity(noise, torch.tensor([0.2, 0.9]), z).any()
    torch.testing.assert_close(head.sample(z, noise=noise, temperature=0.5), 0.5 * noise)
    latents, t = torch.randn(2, 4), torch.tensor([0.1, 0.7])
    torch.testing.assert_close(head.loss(z, latents, t, noise), (noise - latents).square().mean(-1))


def test_latents_of_any_leading_shape_are_learned():
    head = make_head()
    z, latents, noise, t = torch.randn(2, 3, 10), torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.rand(2, 3)
    losses = head.loss(z, latents, t, noise)
    assert losses.shape == (2, 3)
    alone = head.loss(z[1, 2:], latents[1, 2:], t[1, 2:], noise[1, 2:])
    torch.testing.assert_close(alone, losses[1, 2:])
    drawn = [head.loss(z, latents, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("kinds", [1, 2, 3])
@pytest.mark.parametrize("renorm", [False, True])
def test_a_guided_latent_does_not_depend_on_its_batch(kinds, renorm):
    head, noise = make_head(), torch.randn(3, 4)
    rows = conditions(kinds, 3)
    batch = head.sample(*rows, noise=noise, renorm=renorm)
    for i in range(3):
        alone = head.sample(*(z[i : i + 1] for z in rows), noise=noise[i : i + 1], renorm=renorm)
        torch.testing.assert_close(alone, batch[i : i + 1])


def test_guidance_of_one_is_none():
    head, noise = make_head(), torch.randn(2, 4)
    z, *others = conditions(3)
    plain = head.sample(z, noise=noise)
    for given in (others[:1], others):
        one = head.sample(z, *given, text_scale=1.0, image_scale=1.0, noise=noise)
        torch.testing.assert_close(one, plain)
        assert not torch.allclose(head.sample(z, *given, noise=noise), plain)


def test_the_scale_of_images_counts_only_where_the_text_alone_is_left_out():
    head, noise = make_head(), torch.randn(2, 4)
    z, unconditional, text_unconditional = conditions(3)
    two = [head.sample(z, unconditional, image_scale=scale, noise=noise) for scale in (1.0, 5.0)]
    assert torch.equal(*two)
    three = [head.sample(z, unconditional, text_unconditional, image_scale=scale, noise=noise) for scale in (1.0, 5.0)]
    assert not torch.allclose(*three)


def test_start_noise_is_drawn_for_each_latent_or_once():
    head = make_head(0)  # predicts zero, so that it returns the noise
    z = conditions(1, 4)[0]
    draw = lambda **options: head.sample(z, generator=torch.Generator().manual_seed(1), **options)  # noqa: E731
    assert len(draw().unique(dim=0)) == 4
    assert len(draw(shared_noise=True).unique(dim=0)) == 1
    torch.testing.assert_close(draw(temperature=0.5), 0.5 * draw())


def test_steps_and_their_spacing_can_be_chosen():
    head, noise = make_head(), torch.randn(2, 4)
    z = conditions(1)[0]
    times = []
    head.net.register_forward_pre_hook(lambda module, inputs: times.append(inputs[1][0].item()))
    head.sample(z, noise=noise)
    assert times == [1, 0.75, 0.5, 0.25]
    times.clear()
    head.sample(z, noise=noise, num_steps=2, time_shift=3.0)
    assert times == [1, 0.75]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"z": torch.zeros(2, 9)}, r"conditions are \(B, 10\), got shape \(2, 9\)"),
        ({"unconditional": torch.zeros(1, 10)}, r"unconditional is one condition for each of z \(2, 10\)"),
        ({"text_unconditional": torch.zeros(2, 10)}, "beside unconditional=, which is missing"),
        ({"noise": torch.zeros(3, 4)}, r"noise is \(2, 4\), or \(1, 4\) for all latents, got \(3, 4\)"),
        ({"num_steps": 0}, "num_steps must be an integer of at least 1 and at most 100000, got 0"),
        ({"num_steps": "8"}, "num_steps must be an integer of at least 1 and at most 100000, got '8'"),
        ({"time_shift": 0.0}, "time_shift must be above 0"),
        ({"temperature": -1.0}, "temperature must not be below 0, and a finite number, got -1"),
    ],
)
def test_what_cannot_be_sampled_is_refused(arguments, complaint):
    with pytest.raises(ZooError, match=complaint):
        make_head().sample(**{"z": torch.zeros(2, 10)} | arguments)


def test_head_sizes_that_cannot_be_are_refused():
    with pytest.raises(ZooError, match="num_steps must be an integer of at least 1, got '8'"):
        FlowHeadConfig(**HEAD_SIZES | {"num_steps": "8"})

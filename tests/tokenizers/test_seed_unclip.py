"""Pixels of SEED's embeddings, through diffusers' own pipelines at tiny sizes with random weights."""

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from zoo import ZooError
from zoo.tokenizers.seed.unclip import StableDiffusionDecoder, UnCLIPDecoder, class_labels, load_decoder

WIDTH, SIZE = 16, 32
TEXT_SHAPE = (77, 12)
FAST = {"num_steps": 3}


def shared_parts():
    """What both pipelines consist of, but for the UNet, which has more inputs in unCLIP."""
    from diffusers import AutoencoderKL, DDIMScheduler
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    words = ["<|startoftext|>", "<|endoftext|>", "a", "b", "a</w>", "b</w>"]
    text = {"hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vae = {"block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": 4, "sample_size": SIZE}
    return {
        "vae": AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **vae
        ),
        "text_encoder": CLIPTextModel(CLIPTextConfig(vocab_size=len(words), max_position_embeddings=77, **text, **ids)),
        "tokenizer": CLIPTokenizer({word: i for i, word in enumerate(words)}, [], model_max_length=77),
        "scheduler": DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False
        ),
    }


def tiny_unet(**settings):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIZE // 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=TEXT_SHAPE[1],
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **settings,
    )


def save_as_published(pipeline, folder, **others):
    """The parts in `others` stand in the index, as those of the hub do, and have no files: nothing may read them."""
    with torch.no_grad():  # so that what the UNet is told shows in the picture
        for parameter in pipeline.unet.parameters():
            parameter.mul_(1.5)
    pipeline.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | others))
    return folder


@pytest.fixture(scope="module")
def unclip_folder(tmp_path_factory):
    from diffusers import DDPMScheduler, StableUnCLIPImg2ImgPipeline
    from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer

    torch.manual_seed(0)
    normalizer = StableUnCLIPImageNormalizer(WIDTH)
    normalizer.load_state_dict({"mean": torch.randn(1, WIDTH), "std": torch.rand(1, WIDTH) + 0.5})
    pipeline = StableUnCLIPImg2ImgPipeline(
        image_normalizer=normalizer,
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        unet=tiny_unet(class_embed_type="projection", projection_class_embeddings_input_dim=2 * WIDTH),
        image_encoder=None,
        feature_extractor=None,
        **shared_parts(),
    )
    return save_as_published(
        pipeline,
        tmp_path_factory.mktemp("seed") / "unclip",
        image_encoder=["transformers", "CLIPVisionModelWithProjection"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
    )


@pytest.fixture(scope="module")
def diffusion_folder(tmp_path_factory):
    from diffusers import StableDiffusionPipeline

    torch.manual_seed(1)
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return save_as_published(
        StableDiffusionPipeline(unet=tiny_unet(), **shared_parts(), **none),
        tmp_path_factory.mktemp("seed") / "diffusion",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
    )


@pytest.fixture
def unclip(unclip_folder):
    return UnCLIPDecoder.load(unclip_folder, embed_shape=(WIDTH,))


@pytest.fixture
def diffusion(diffusion_folder):
    return StableDiffusionDecoder.load(diffusion_folder)


@pytest.fixture(params=["unclip", "diffusion"])
def decoder(request):
    return request.getfixturevalue(request.param)


def embeddings_for(decoder, count=2, key=0):
    return torch.randn(count, *decoder.embed_shape, generator=torch.Generator().manual_seed(key))


def use_scheduler(pipeline, name):
    import diffusers

    settings = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}  # as published
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **settings)


def assert_differ(images, others):
    assert (images - others).abs().amax((1, 2, 3)).min() > 1e-3


def test_importing_it_loads_neither_diffusers_nor_transformers():
    code = "import sys, zoo.tokenizers.seed.unclip; print({'diffusers', 'transformers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_images_are_float_in_0_1_and_come_again(decoder, capfd):
    embeddings = embeddings_for(decoder)
    images = decoder.decode(embeddings, **FAST)
    assert images.shape == (2, 3, SIZE, SIZE) == (2, 3, decoder.image_size, decoder.image_size)
    assert images.dtype == torch.float32
    assert not images.requires_grad
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.std() > 0.01
    assert torch.equal(images, decoder.decode(embeddings, **FAST))
    assert_differ(images[:1], images[1:])
    assert capfd.readouterr().err == ""
    assert torch.equal(images, decoder.decode(embeddings, **FAST, progress=True))
    assert "3/3" in capfd.readouterr().err


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerAncestralDiscreteScheduler"])
def test_a_batch_equals_its_images_one_by_one(decoder, scheduler):
    """With a scheduler that draws noise in its steps, too."""
    use_scheduler(decoder.pipeline, scheduler)
    embeddings, negative = embeddings_for(decoder, 3), embeddings_for(decoder, 3, key=1)
    together = decoder.decode(embeddings, negative, **FAST)
    alone = [decoder.decode(e[None], n[None], **FAST) for e, n in zip(embeddings, negative, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


def test_one_negative_is_that_of_all(decoder):
    embeddings, negative = embeddings_for(decoder), embeddings_for(decoder, 1, key=1)
    torch.testing.assert_close(
        decoder.decode(embeddings, negative, **FAST),
        decoder.decode(embeddings, negative.repeat(2, *([1] * (negative.ndim - 1))), **FAST),
    )


def test_embedding_negative_guidance_steps_and_seed_change_the_picture(decoder):
    embeddings, negative = embeddings_for(decoder), embeddings_for(decoder, key=1)
    images = decoder.decode(embeddings, **FAST)
    assert_differ(images, decoder.decode(negative, **FAST))
    assert_differ(images, decoder.decode(embeddings, negative, **FAST))
    assert_differ(images, decoder.decode(embeddings, **FAST, guidance=1.5))
    assert_differ(images, decoder.decode(embeddings, **FAST, seed=1))
    assert_differ(images, decoder.decode(embeddings, num_steps=2))


def test_the_noise_level_changes_the_picture(unclip):
    embeddings = embeddings_for(unclip)
    assert_differ(unclip.decode(embeddings, **FAST), unclip.decode(embeddings, **FAST, noise_level=700))


def test_guidance_1_leaves_out_the_negative(decoder):
    embeddings, negative = embeddings_for(decoder), embeddings_for(decoder, key=1)
    torch.testing.assert_close(
        decoder.decode(embeddings, negative, **FAST, guidance=1), decoder.decode(embeddings, **FAST, guidance=1)
    )


def test_a_generator_draws_the_seed(decoder):
    embeddings, generator = embeddings_for(decoder), torch.Generator().manual_seed(5)
    first, second = (decoder.decode(embeddings, **FAST, generator=generator) for _ in range(2))
    assert_differ(first, second)
    assert torch.equal(first, decoder.decode(embeddings, **FAST, generator=torch.Generator().manual_seed(5)))


@pytest.mark.parametrize("guidance", [1, 10.0])
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "PNDMScheduler", "EulerAncestralDiscreteScheduler"])
def test_the_stock_pipeline_of_unclip_gives_the_same_picture(unclip, scheduler, guidance):
    """It asks an image encoder for a dtype, which the text encoder answers as well."""
    from diffusers import StableUnCLIPImg2ImgPipeline

    use_scheduler(unclip.pipeline, scheduler)
    stock = StableUnCLIPImg2ImgPipeline(**unclip.pipeline.components | {"image_encoder": unclip.pipeline.text_encoder})
    stock.set_progress_bar_config(disable=True)
    embeddings, settings = embeddings_for(unclip, 1), {"num_inference_steps": 3, "guidance_scale": guidance}
    settings |= {"generator": torch.Generator().manual_seed(7), "noise_level": 100, "output_type": "pt"}
    expected = stock(prompt="", image_embeds=embeddings, **settings).images
    ours = unclip.decode(embeddings, guidance=guidance, noise_level=100, seed=7, **FAST)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("guidance", [1, 7.5])
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "PNDMScheduler", "EulerAncestralDiscreteScheduler"])
def test_the_features_of_a_prompt_give_the_picture_of_the_prompt(diffusion, scheduler, guidance):
    use_scheduler(diffusion.pipeline, scheduler)
    settings = {"num_inference_steps": 3, "guidance_scale": guidance, "output_type": "pt"}
    expected = diffusion.pipeline("a b a", generator=torch.Generator().manual_seed(7), **settings).images
    features = diffusion.pipeline.encode_prompt("a b a", "cpu", 1, False)[0]
    torch.testing.assert_close(diffusion.decode(features, guidance=guidance, seed=7, **FAST), expected)


@torch.no_grad()
def test_a_label_is_the_noised_embedding_beside_its_step(unclip):
    """Against the formulas, written out."""
    pipeline, level = unclip.pipeline, 300
    e, noise, negative, negative_noise = (embeddings_for(unclip, key=key) for key in range(4))
    f = lambda i: math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2  # noqa: E731
    mean, std = pipeline.image_normalizer.mean, pipeline.image_normalizer.std

    def label(e, noise, level):
        kept = math.prod(1 - min(0.999, 1 - f(i + 1) / f(i)) for i in range(level + 1))
        noised = (kept**0.5 * (e - mean) / std + (1 - kept) ** 0.5 * noise) * std + mean
        angles = level * 10000 ** (-torch.arange(WIDTH // 2) / (WIDTH // 2))
        return torch.cat([noised, angles.cos().expand(2, -1), angles.sin().expand(2, -1)], dim=1)

    found = class_labels(pipeline, e, noise, level, negative, negative_noise)
    expected = torch.cat([label(negative, negative_noise, 0), label(e, noise, level)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(class_labels(pipeline, e, noise, level), torch.cat([torch.zeros(2, 2 * WIDTH), found[2:]]))
    assert torch.equal(class_labels(pipeline, e, noise, level, guided=False), found[2:])


def test_the_unet_is_told_the_empty_prompt_and_zeros_or_the_negative(unclip):
    told = []
    unclip.pipeline.unet.register_forward_pre_hook(lambda m, args, given: told.append(given), with_kwargs=True)
    embeddings, negative = embeddings_for(unclip), embeddings_for(unclip, 1, key=1)
    unclip.decode(embeddings, num_steps=1)
    unclip.decode(embeddings, negative, num_steps=1)
    unclip.decode(embeddings, num_steps=1, guidance=1)
    zeros, negatives, alone = (given["class_labels"] for given in told)
    empty = unclip.pipeline.encode_prompt("", "cpu", 1, False)[0]
    assert torch.equal(told[0]["encoder_hidden_states"], empty.expand(4, -1, -1))
    assert torch.equal(zeros, torch.cat([torch.zeros(2, 2 * WIDTH), alone]))
    assert torch.equal(negatives[2:], alone)
    # level 0 is a little noise, of which the negative has its own draw
    std = unclip.pipeline.image_normalizer.std
    noise, other = (alone[:, :WIDTH] - embeddings) / std, (negatives[:2, :WIDTH] - negative) / std
    for one in (noise, other):
        assert 0.002 < one.std() < 0.02
    assert torch.equal(negatives[0], negatives[1])
    assert (noise[0] - other[0]).abs().max() > 0.002
    torch.testing.assert_close(negatives[:2, WIDTH:], alone[:, WIDTH:])


def test_half_precision_starts_from_the_same_noise(decoder):
    starts = []
    decoder.pipeline.unet.register_forward_pre_hook(lambda m, args: starts.append(args[0]))
    embeddings = embeddings_for(decoder)
    decoder.decode(embeddings, num_steps=1)
    assert decoder.to("cpu", torch.bfloat16) is decoder
    images = decoder.decode(embeddings, num_steps=1)
    assert decoder.dtype == starts[1].dtype == torch.bfloat16
    assert images.dtype == torch.float32
    assert torch.equal(starts[1], starts[0].bfloat16())


def test_the_labels_are_made_in_float32_whatever_the_dtype(unclip):
    """In half precision the noise of level 0 would round to none."""
    told = []
    unclip.pipeline.unet.register_forward_pre_hook(lambda m, args, given: told.append(given), with_kwargs=True)
    normalizer, embeddings = unclip.pipeline.image_normalizer, embeddings_for(unclip)
    normalizer.to("cpu", torch.bfloat16).to("cpu", torch.float32)  # so that its numbers are the same in both
    unclip.decode(embeddings, num_steps=1, guidance=1)
    unclip.to(dtype=torch.bfloat16).decode(embeddings, num_steps=1, guidance=1)
    assert normalizer.dtype == torch.bfloat16
    assert torch.equal(told[1]["class_labels"], told[0]["class_labels"].bfloat16())


def test_the_shape_of_the_embedding_chooses_the_decoder(unclip_folder, diffusion_folder):
    assert type(load_decoder(unclip_folder, (WIDTH,))) is UnCLIPDecoder
    decoder = load_decoder(str(diffusion_folder), TEXT_SHAPE, torch.bfloat16)
    assert type(decoder) is StableDiffusionDecoder
    assert decoder.embed_shape == TEXT_SHAPE
    assert decoder.dtype == torch.bfloat16
    with pytest.raises(ZooError, match=r"\(E,\) or \(N, D\), got \(1, 2, 3\)"):
        load_decoder(unclip_folder, (1, 2, 3))


def test_a_pipeline_for_other_embeddings_is_named_with_both_widths(unclip_folder, diffusion_folder, unclip):
    with pytest.raises(
        ZooError, match=r"\(B, 16\) for a UNet with class labels of width 32, and is to decode .* of width 48"
    ):
        load_decoder(unclip_folder, (24,))
    with pytest.raises(ZooError, match=r"labels of width 32, got shape \(1, 24\): .* labels of width 48"):
        unclip.decode(torch.zeros(1, 24))
    with pytest.raises(ZooError, match=r"\(B, 77, 12\), and is to decode embeddings of 77 x 768"):
        load_decoder(diffusion_folder, (77, 768))


def test_parts_of_two_unclip_models_are_refused(unclip):
    from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer

    unclip.pipeline.image_normalizer = StableUnCLIPImageNormalizer(24)
    with pytest.raises(ZooError, match="make class labels of width 48, and its UNet takes 32"):
        UnCLIPDecoder(unclip.pipeline)
    unclip.pipeline.unet = tiny_unet()
    with pytest.raises(ZooError, match="takes none"):
        UnCLIPDecoder(unclip.pipeline)


def test_a_pipeline_of_the_other_kind_is_refused(unclip_folder, diffusion_folder):
    with pytest.raises(ZooError, match="holds no complete StableUnCLIPImg2ImgPipeline"):
        UnCLIPDecoder.load(diffusion_folder)
    with pytest.raises(ZooError, match="use a Stable Diffusion"):
        StableDiffusionDecoder.load(unclip_folder)


def test_what_cannot_be_loaded_says_what_is_missing(tmp_path, unclip_folder, monkeypatch):
    for missing in (tmp_path / "none", "unclip", "a/b/c"):
        with pytest.raises(ZooError, match=f"no folder '{missing}' with a StableUnCLIPImg2ImgPipeline; give one"):
            UnCLIPDecoder.load(missing)
    with pytest.raises(ZooError, match=r"holds no complete .* \(OSError: .*model_index.json.*\); copy"):
        UnCLIPDecoder.load(tmp_path)

    from diffusers import StableUnCLIPImg2ImgPipeline

    def offline(*args, **settings):
        raise OSError("a long story about the cache") from ConnectionError("no route to host\nmore")

    monkeypatch.setattr(StableUnCLIPImg2ImgPipeline, "download", offline)
    with pytest.raises(
        ZooError, match=r"'an-owner/unclip' is not complete .*\(ConnectionError: no route to host\); fetch"
    ):
        UnCLIPDecoder.load("an-owner/unclip")


def test_weights_that_are_no_safetensors_are_not_opened(tmp_path, unclip_folder):
    """Though diffusers could read these."""
    pickled = shutil.copytree(unclip_folder, tmp_path / "pickled")
    weights = pickled / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ZooError, match="with safetensors files"):
        UnCLIPDecoder.load(pickled)


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        ([0.0] * WIDTH, "got list"),
        (torch.zeros(1, WIDTH, dtype=torch.int64), "got torch.int64; decode ids"),
        (torch.zeros(WIDTH), r"got shape \(16,\)"),
        (torch.zeros(()), r"got shape \(\)"),
        (torch.zeros(0, WIDTH), r"got shape \(0, 16\)"),
        (torch.full((1, WIDTH), torch.nan), "NaN or infinite"),
        (torch.full((1, WIDTH), torch.inf), "NaN or infinite"),
    ],
)
def test_wrong_embeddings_say_what_was_expected(unclip, embeddings, message):
    with pytest.raises(ZooError, match=f"^embeddings: .*{message}"):
        unclip.decode(embeddings)
    with pytest.raises(ZooError, match=f"^negative: .*{message}"):
        unclip.decode(torch.zeros(1, WIDTH), embeddings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": 0.5}, "guidance is a number of at least 1, which is none, got 0.5"),
        ({"guidance": math.nan}, "guidance .* got nan"),
        ({"guidance": math.inf}, "guidance .* got inf"),
        ({"guidance": True}, "guidance .* got True"),
        ({"num_steps": 0}, "num_steps is a whole number from 1 to 1000, got 0"),
        ({"num_steps": 2.0}, "num_steps .* got 2.0"),
        ({"num_steps": 1001}, "num_steps .* got 1001"),
        ({"noise_level": -1}, "noise_level is a whole number from 0 to 999, got -1"),
        ({"noise_level": 1000}, "noise_level .* got 1000"),
        ({"noise_level": 0.0}, "noise_level .* got 0.0"),
        ({"seed": -1}, "seed .* got -1"),
        ({"seed": None}, "seed .* got None"),
        ({"negative": torch.zeros(2, WIDTH)}, "one for each of the 3 images, got 2"),
    ],
)
def test_wrong_settings_say_what_was_expected(unclip, settings, message):
    with pytest.raises(ZooError, match=message):
        unclip.decode(embeddings_for(unclip, 3), **settings)


def test_pixels_that_are_no_numbers_are_not_returned(decoder):
    with torch.no_grad():
        decoder.pipeline.vae.decoder.conv_out.bias.fill_(torch.nan)
    with pytest.raises(ZooError, match=r"torch.float32 gave NaN"):
        decoder.decode(embeddings_for(decoder), num_steps=1)

"""The SigLIP encoder, and how it is trained."""

import pytest
import torch
from hydra.utils import instantiate

import zoo
from zoo import ZooError, registry
from zoo.commands import cli
from zoo.data import Loader, scenes
from zoo.metrics.retrieval import Retrieval
from zoo.tokenizers.siglip.encoder import SCENE_WORDS
from zoo.tokenizers.siglip.published import from_published, to_published
from zoo.tokenizers.siglip.text import contradict, words
from zoo.tokenizers.siglip.training import captions_of, false_captions, mirrored

SIZES = {"width": 48, "depth": 3, "num_heads": 4, "text_width": 32, "text_depth": 2, "text_heads": 2}
PUBLISHED = "siglip-base-patch16-224", "siglip2-so400m-patch16-256", "siglip2-so400m-patch14-384"


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return zoo.create_encoder("siglip-tiny", **SIZES).eval()


@pytest.fixture
def images():
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def theirs():
    """transformers' model with other sizes of text and image, every parameter random."""
    from transformers import SiglipConfig, SiglipModel

    layer = {"num_attention_heads": 4, "vocab_size": 50, "max_position_embeddings": 9}
    text = layer | {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "projection_size": 48}
    vision = {"hidden_size": 48, "intermediate_size": 144, "num_hidden_layers": 3, "num_attention_heads": 4}
    torch.manual_seed(0)
    vision |= {"image_size": 60, "patch_size": 16}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    """The zoo's, from a file of theirs."""
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("siglip") / "model.safetensors"
    save_file(theirs.state_dict(), path)
    other = {"image_size": 60, "patch_size": 16, "text_length": 9, "vocab_size": 50, "mlp_ratio": 3.0, "text_heads": 4}
    return zoo.load_encoder("siglip-base-patch16-224", path, **SIZES | other)


def test_it_gives_what_transformers_gives(theirs, ours):
    """Of images whose last 12 pixels belong to no patch, as with 384 pixels and patches of 14."""
    images, ids = torch.rand(2, 3, 60, 60), torch.randint(50, (3, 9))
    close = {"rtol": 1e-5, "atol": 1e-5}
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=2 * images - 1)
        vision = theirs.vision_model(2 * images - 1, output_hidden_states=True)
        embeddings = ours(images, ids)
        for layer, hidden in enumerate(vision.hidden_states):
            torch.testing.assert_close(ours.features(images, layer=layer), hidden, **close)
        torch.testing.assert_close(ours.vision(2 * images - 1), vision.pooler_output, **close)
        torch.testing.assert_close(ours.text(ids), theirs.text_model(ids).pooler_output, **close)
        torch.testing.assert_close(ours.logits(*embeddings), expected.logits_per_image, **close)
    torch.testing.assert_close(ours.features(images), vision.last_hidden_state, **close)
    torch.testing.assert_close(embeddings, (expected.image_embeds, expected.text_embeds), **close)


def test_their_names_and_ours_are_the_same_both_ways(theirs, ours):
    back = to_published(ours.state_dict(), ours.config)
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.state_dict().items())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_fit_transformers_names(name):
    from transformers import SiglipConfig, SiglipModel

    with torch.device("meta"):
        made = zoo.create_encoder(name)
        c, hidden = made.config, 4304 if "so400m" in name else 3072
        layer = {"hidden_size": c.width, "intermediate_size": hidden}
        text = {"num_hidden_layers": c.text_depth, "num_attention_heads": c.text_heads, "vocab_size": c.vocab_size}
        vision = {"num_hidden_layers": c.depth, "num_attention_heads": c.num_heads, "patch_size": c.patch_size}
        vision |= layer | {"image_size": c.image_size}
        state = SiglipModel(SiglipConfig(text_config=layer | text, vision_config=vision)).state_dict()
    converted = {n: tensor.shape for n, tensor in from_published(state, c).items()}
    assert converted == {n: tensor.shape for n, tensor in made.state_dict().items()}


def test_features_replaced_between_layers_reach_the_embedding(encoder, images):
    """What a system does that quantises the output of a layer."""
    with torch.no_grad():
        tower, values = encoder.vision, 2 * images - 1
        h2 = tower.layers(tower.embed(values), stop=2)
        torch.testing.assert_close(h2, encoder.features(images, layer=2))
        torch.testing.assert_close(tower.pool(tower.layers(h2, start=2)), tower(values))
        assert not torch.allclose(tower.pool(tower.layers(h2.flip(0), start=2)), tower(values))


def test_embeddings_have_length_one_and_keep_no_gradient(encoder, images):
    texts = ["a red cube", "two small cones", "A large ring."]
    for embeddings in (encoder.encode_image(images), encoder.encode_text(texts)):
        assert embeddings.shape == (3, 48)
        assert not embeddings.requires_grad
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))
    assert encoder.features(images).shape == (3, 64, 48)
    assert not encoder.features(images).requires_grad


def test_similarity_is_the_scaled_cosine_and_the_bias(encoder, images):
    texts = ["a red cube", "two small cones"]
    cosine = encoder.encode_image(images) @ encoder.encode_text(texts).T
    torch.testing.assert_close(encoder.similarity(images, texts), 10 * cosine - 10)


def test_a_batch_equals_its_images_and_texts_one_by_one(encoder, images):
    texts = ["a red cube", "two small cones and a large blue ring", "five"]
    for together, alone in (
        (encoder.encode_image(images), [encoder.encode_image(image[None]) for image in images]),
        (encoder.encode_text(texts), [encoder.encode_text([text]) for text in texts]),
    ):
        torch.testing.assert_close(together, torch.cat(alone))


def test_words_become_ids_and_unknown_ones_one_id(encoder):
    ids = encoder.text_ids(["A red CUBE, a zebra"])
    vocabulary = SCENE_WORDS.split()
    assert [vocabulary[i] for i in ids[0, :6]] == ["a", "red", "cube", ",", "a", "<unk>"]
    assert (ids[0, 6:] == vocabulary.index("<pad>")).all()
    assert ids.shape == (1, encoder.info.text_length)
    assert encoder.text_ids(["cube " * 67], truncate=True).tolist() == [[vocabulary.index("cube")] * 66]


def test_every_word_of_the_scenes_is_known_and_every_caption_fits(encoder):
    captions = [
        caption
        for split in ("train", "val")
        for batch in Loader(scenes(split), batch_size=256, fields=["caption"])
        for caption in batch["caption"]
    ]
    assert {word for caption in captions for word in words(caption)} == set(SCENE_WORDS.split()[2:])
    encoder.text_ids(captions)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda e: e.encode_image("a string"), "got str"),
        (lambda e: e.encode_image(torch.zeros(1, 3, 32, 64)), "64 x 64 pixels, got 32 x 64"),
        (lambda e: e.features(torch.full((1, 3, 64, 64), 255.0)), "values from 255 to 255"),
        (lambda e: e.features(torch.zeros(1, 3, 64, 64), layer=4), r"layers 0\.\.3.*got 4"),
        (lambda e: e.features(torch.zeros(1, 3, 64, 64), layer=-1), r"layers 0\.\.3.*got -1"),
        (lambda e: e.encode_text("a red cube"), "list of at least one text, got 'a red cube'"),
        (lambda e: e.encode_text([]), r"at least one text, got \[\]"),
        (lambda e: e.encode_text([1]), r"at least one text, got \[1\]"),
        (lambda e: e.encode_text(1), "at least one text, got 1"),
        (lambda e: e.encode_text(["cube " * 67]), "67 tokens is longer than the 66 that are read: 'cube cube"),
        (lambda e: zoo.create_encoder("siglip-tiny", width=50), "width 50 .* number of heads 4"),
        (lambda e: zoo.create_encoder("siglip-tiny", vocab_size=9), "vocab_size is 9, .* has 73 words"),
        (lambda e: zoo.create_encoder("siglip-tiny", patch_size=65), "from 1 to image_size 64"),
        (lambda e: zoo.create_encoder("siglip-tiny", vocabulary=("a", "b")), "must begin with <pad> and <unk>"),
        (lambda e: zoo.create_encoder("siglip-tiny", depth=0), "above 0"),
        (lambda e: zoo.load_encoder("siglip-tinny"), "no encoder is called 'siglip-tinny'; did you mean siglip-tiny"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(encoder, call, complaint):
    with pytest.raises(ZooError, match=complaint):
        call(encoder)


def test_a_text_tokenizer_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    encoder = zoo.create_encoder("siglip-base-patch16-224", text_tokenizer="/nowhere/tokenizer", **SIZES)
    with pytest.raises(ZooError, match=r"text tokenizer '/nowhere/tokenizer' is not on this machine.*text_tokenizer="):
        encoder.encode_text(["a cat"])


def test_a_tokenizer_of_transformers_is_read_from_its_folder_and_padded_at_the_end(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "a": 2, "cat": 3}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", padding_side="left")
    fast.save_pretrained(tmp_path)
    encoder = zoo.create_encoder("siglip-base-patch16-224", text_tokenizer=str(tmp_path), text_length=5, **SIZES)
    assert encoder.text_ids(["A cat", "dog"]).tolist() == [[2, 3, 0, 0, 0], [1, 0, 0, 0, 0]]
    with pytest.raises(ZooError, match="6 tokens is longer than the 5"):
        encoder.encode_text(["a " * 6])
    assert encoder.text_ids(["a " * 6], truncate=True).tolist() == [[2] * 5]


def test_a_saved_encoder_comes_back_with_its_sizes_and_words(tmp_path, encoder, images):
    registry.save(encoder, tmp_path / "mine.safetensors")
    loaded = zoo.load_encoder("siglip-tiny", tmp_path / "mine.safetensors")
    assert loaded.config == encoder.config
    assert not loaded.training
    texts = ["a red cube"]
    assert torch.equal(loaded.similarity(images, texts), encoder.similarity(images, texts))


def test_encoders_are_listed_beside_tokenizers(capsys):
    from zoo.commands import info, list

    assert {*PUBLISHED, "siglip-tiny"} == set(zoo.list_encoders("siglip*"))
    assert "siglip-tiny" not in zoo.list_tokenizers()
    list.main(["siglip-tiny"])
    info.main(["siglip-tiny"])
    assert "text_length" in capsys.readouterr().out


def test_only_captions_that_name_no_side_are_mirrored():
    images = torch.arange(8.0).view(4, 1, 1, 2)
    captions = ["From left to right, two cubes.", "two cubes", "two cubes", "a cube on the right."]
    changed = mirrored(images, captions, torch.tensor([0.1, 0.1, 0.9, 0.1]))
    assert changed.flatten().tolist() == [0, 1, 3, 2, 4, 5, 6, 7]


ALTERNATIVES = [("red", "blue", "green"), ("pale blue",), ("two", "three"), ("cube", "ring")]
CAPTION = "Two objects on a pale blue floor: a red cube and a Red ring."


@pytest.mark.parametrize(
    ("draws", "old", "new"),
    [
        ((0.0, 0.9, 0.9), "Two objects", "three objects"),
        ((0.4, 0.0, 0.0), "a red cube", "a blue cube"),
        ((0.4, 0.9, 0.9), "a Red ring", "a green ring"),
        ((0.9, 0.9, 0.9), "Red ring", "Red cube"),
    ],
)
def test_a_false_caption_has_one_word_replaced_by_another_of_its_list(draws, old, new):
    assert contradict(CAPTION, ALTERNATIVES, draws) == CAPTION.replace(old, new)


def test_words_without_an_alternative_are_left_alone():
    assert contradict("A ring on a pale blue floor.", [("red", "blue"), ("pale blue",)], (0.0, 0.0, 0.0)) is None


def test_a_caption_that_cannot_be_made_false_is_named(encoder):
    module = instantiate(cli.compose("train", ["experiment=siglip-tiny"]).module, tokenizer=None)
    with pytest.raises(ZooError, match=r"'Nothing at all.' has no word of module\.alternatives"):
        false_captions(["two cubes", "Nothing at all."], module.alternatives, torch.zeros(2, 3))


SMALL = [
    *(f"encoder.{name}={size}" for name, size in SIZES.items()),
    *("optimizer._target_=torch.optim.SGD", "~optimizer.betas", "optimizer.lr=1e-2", "schedule.warmup_steps=0"),
]


def test_two_ranks_train_as_one(tmp_path, train_on):
    one, two = (train_on(n, tmp_path / str(n), "siglip-tiny", *SMALL) for n in (1, 2))
    assert two["train/gradient_norm/encoder"] == pytest.approx(one["train/gradient_norm/encoder"], rel=1e-4)
    assert "val/image_to_text_recall@1" in two
    states = [zoo.load_encoder("siglip-tiny", tmp_path / f"{n}/encoder.safetensors").state_dict() for n in (1, 2)]
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-4, atol=1e-6)


def test_a_training_can_start_from_trained_weights(tmp_path, encoder):
    registry.save(encoder, tmp_path / "encoder.safetensors")
    weights = f"module.encoder_weights={tmp_path}/encoder.safetensors"
    cfg = cli.compose("train", ["experiment=siglip-tiny", *SMALL, weights])
    started = instantiate(cfg.module, tokenizer=None).encoder
    assert started.training
    assert all(torch.equal(a, b) for a, b in zip(started.parameters(), encoder.parameters(), strict=True))


def test_a_training_that_is_to_be_compiled_compiles_the_encoder():
    module = instantiate(cli.compose("train", ["experiment=siglip-tiny", "module.compile=true"]).module, tokenizer=None)
    module.setup("fit")
    assert module.encoder._compiled_call_impl is not None


def test_a_training_without_captions_or_with_weights_of_a_tokenizer_says_what_to_change(tmp_path):
    from zoo.commands.train import train

    with pytest.raises(ZooError, match=r"no field 'caption'.*add it to data.fields"):
        captions_of({"image": 0})
    with pytest.raises(ZooError, match=r"use module\.encoder_weights"):
        train(cli.compose("train", ["experiment=siglip-tiny", "weights=some.ckpt", f"output_dir={tmp_path}"]))


def test_the_trained_encoder_finds_scenes_it_was_not_trained_on():
    trained, retrieval = zoo.load_encoder("siglip-tiny"), Retrieval()
    for batch in Loader(scenes("val"), batch_size=128, fields=["image", "caption"]):
        retrieval.update(trained.encode_image(batch["image"]), trained.encode_text(batch["caption"]), batch["caption"])
    assert all(recall > 0.75 for recall in retrieval.compute().values())

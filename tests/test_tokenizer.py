import pytest
import torch

import zoo
from zoo import Tokens, ZooError


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return zoo.create_tokenizer("aurora-tiny", codebook_init="published").eval()


@pytest.fixture
def maps():
    return torch.rand(3, 1, 64, 64, generator=torch.Generator().manual_seed(1))


def test_a_batch_equals_its_images_one_by_one(tokenizer, maps):
    together = tokenizer.encode(maps)
    for i in range(len(maps)):
        alone = tokenizer.encode(maps[i : i + 1])
        assert torch.equal(alone.ids["depth"], together[i].ids["depth"])
        torch.testing.assert_close(tokenizer.decode(alone), tokenizer.decode(together)[i : i + 1])


def test_encoding_and_decoding_keep_no_gradient_and_stay_in_range(tokenizer, maps):
    tokens = tokenizer.encode(maps)
    images = tokenizer.decode(tokens)
    assert tokens.ids["depth"].shape == (3, 64)
    assert tokens.grid == (8, 8)
    assert images.shape == maps.shape
    assert not images.requires_grad
    assert 0 <= images.min() <= images.max() <= 1
    assert torch.equal(tokenizer.reconstruct(maps), images)


def test_maps_of_other_sizes_are_taken_when_the_grid_divides_them(tokenizer):
    tokens = tokenizer.encode(torch.rand(1, 1, 48, 80))
    assert tokens.grid == (6, 10)
    assert tokenizer.decode(tokens).shape == (1, 1, 48, 80)


@pytest.mark.parametrize(
    ("images", "complaint"),
    [
        ("a string", "got str"),
        (torch.zeros(1, 1, 64, 64, dtype=torch.uint8), "torch.uint8.*/ 255"),
        (torch.zeros(1, 3, 64, 64), r"got shape \(1, 3, 64, 64\)"),
        (torch.zeros(64, 64), r"got shape \(64, 64\)"),
        (torch.zeros(0, 1, 64, 64), r"got shape \(0, 1, 64, 64\)"),
        (torch.zeros(1, 1, 60, 64), "multiples of 8, got 60 x 64"),
        (torch.full((1, 1, 64, 64), 255.0), "values from 255 to 255"),
        (torch.full((1, 1, 64, 64), float("nan")), "nan"),
    ],
)
def test_wrong_images_are_refused_in_one_sentence(tokenizer, images, complaint):
    with pytest.raises(ZooError, match=complaint):
        tokenizer.encode(images)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: torch.zeros(1, 64).long(), "decodes Tokens, got Tensor"),
        (lambda: Tokens(ids={"pixel": torch.zeros(1, 64).long()}), "stream 'depth'"),
        (lambda: Tokens(ids={"depth": torch.full((1, 64), 128)}), r"0\.\.127, got values from 128"),
        (lambda: Tokens(ids={"depth": torch.full((1, 64), -1)}), "from -1"),
        (lambda: Tokens(ids={"depth": torch.zeros(1, 64, 2).long()}), r"are \(B, N\)"),
        (lambda: Tokens(ids={"depth": torch.zeros(1, 60).long()}), "no square map"),
    ],
)
def test_wrong_tokens_are_refused_in_one_sentence(tokenizer, make, complaint):
    with pytest.raises(ZooError, match=complaint):
        tokenizer.decode(make())


def test_features_are_refused_by_a_tokenizer_without_them(tokenizer, maps):
    with pytest.raises(ZooError, match="no features"):
        tokenizer.features(maps)


def test_texts_are_refused_by_a_tokenizer_without_a_text_side(tokenizer, maps):
    for ask in (
        lambda: tokenizer.encode_image(maps),
        lambda: tokenizer.encode_text(["a cube"]),
        lambda: tokenizer.similarity(maps, ["a cube"]),
    ):
        with pytest.raises(ZooError, match=r"aurora-tiny has no text side; .*\.$"):
            ask()


def test_a_system_with_a_text_side_writes_the_two_sides_and_has_the_rest(maps):
    class Bright(zoo.Tokenizer):
        info = zoo.create_tokenizer("aurora-tiny").info

        def __init__(self):
            super().__init__(None)
            self.weight = torch.nn.Parameter(torch.ones(2))

        def _encode_image(self, images):
            return self.weight * images.mean((2, 3))

        def _encode_text(self, texts):
            return self.weight * torch.tensor([[float(len(text)), 0.0] for text in texts])

    made = Bright()
    torch.testing.assert_close(made.encode_image(maps), torch.full((3, 2), 0.5**0.5))
    assert made.encode_text(["a", "bcd"]).tolist() == [[1, 0], [1, 0]]
    assert made.similarity(maps, ["a", "b"]).shape == (3, 2)
    assert not made.similarity(maps, ["a"]).requires_grad
    with pytest.raises(ZooError, match="takes a list of at least one text, got 'a cube'"):
        made.encode_text("a cube")
    with pytest.raises(ZooError, match="values from 255"):
        made.encode_image(torch.full((1, 1, 64, 64), 255.0))


def test_tokens_survive_a_file(tmp_path):
    tokens = Tokens(
        ids={"semantic": torch.arange(12).view(1, 6, 2)},
        latents={"image": torch.randn(1, 6, 4)},
        mask=torch.tensor([[True, True, False, True, False, False]]),
        grid=(2, 3),
    )
    tokens.save(tmp_path / "tokens.safetensors")
    loaded = Tokens.load(tmp_path / "tokens.safetensors")
    assert torch.equal(loaded.ids["semantic"], tokens.ids["semantic"])
    assert torch.equal(loaded.latents["image"], tokens.latents["image"])
    assert torch.equal(loaded.mask, tokens.mask)
    assert loaded.grid == (2, 3)
    assert loaded.lengths.tolist() == [3]
    with pytest.raises(ZooError, match=r"not a file written by Tokens\.save"):
        Tokens.load(__file__)


def test_tokens_are_indexed_over_the_batch():
    tokens = Tokens(ids={"image": torch.arange(12).view(4, 3)})
    assert len(tokens) == 4
    assert tokens[1].ids["image"].tolist() == [[3, 4, 5]]
    assert tokens[1:3].ids["image"].tolist() == [[3, 4, 5], [6, 7, 8]]
    assert tokens[torch.tensor([3, 0])].ids["image"].tolist() == [[9, 10, 11], [0, 1, 2]]
    assert [len(one) for one in tokens] == [1, 1, 1, 1]
    assert tokens.to(torch.bfloat16).ids["image"].dtype == torch.int64


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({}, "at least one stream"),
        ({"ids": {"a": torch.zeros(2, 3)}}, "must be int64"),
        ({"ids": {"a": torch.zeros(2, 3).long(), "b": torch.zeros(2, 4).long()}}, r"share \(B, N\)"),
        ({"ids": {"a": torch.zeros(2, 3).long()}, "mask": torch.ones(2, 4, dtype=torch.bool)}, "'mask'"),
        ({"latents": {"a": torch.zeros(2, 3)}}, r"float \(B, N, D\)"),
        ({"ids": {"a": torch.zeros(2, 3).long()}, "grid": (2, 2)}, "4 places for 3 tokens"),
    ],
)
def test_tokens_that_do_not_belong_together_are_refused(arguments, complaint):
    with pytest.raises(ZooError, match=complaint):
        Tokens(**arguments)

"""Images as words of SEED-LLaMA."""

import json
from pathlib import Path

import pytest
import torch

from zoo import Tokens, ZooError
from zoo.tokenizers.seed import language as lang

GOLDEN = Path(__file__).parents[1] / "reference/seed/golden-tiny.json"
WORDS = [[[0, 5, 8191], "<img><img_00000><img_00005><img_08191></img>", [32000, 32005, 40191]]]
"""What the reference says, too."""
IMAGES = torch.arange(0, 8192, 128).view(2, 32)


def test_words_and_ids_are_those_of_the_reference():
    golden = json.loads(GOLDEN.read_text())["text"]["image_words"] if GOLDEN.is_file() else WORDS
    assert golden == WORDS
    vocabulary = lang.seed_vocabulary()
    for codes, text, ids in golden:
        assert lang.ids_to_text(codes) == text
        assert lang.text_to_ids(text, length=len(codes)).tolist() == [codes]
        assert vocabulary.to_ids("image", torch.tensor(codes)).tolist() == ids
    assert [vocabulary.id_of(word) for word in ("<img>", "</img>")] == [40192, 40193]
    assert len(vocabulary) == 40194


def test_images_are_found_between_other_words():
    texts = [lang.ids_to_text(image) for image in IMAGES]
    text = f"USER: {texts[0]} and {texts[1]}, see?"
    assert torch.equal(lang.text_to_ids(text), IMAGES)
    assert torch.equal(lang.text_to_ids(text.replace("><", "> <")), IMAGES)
    vocabulary = lang.seed_vocabulary()
    first, second = (Tokens(ids={"image": image[None]}) for image in IMAGES)
    ids = vocabulary.join([[1, 5], first, second, [7, 2]])
    assert torch.equal(lang.images_in(ids, vocabulary), IMAGES)
    assert lang.text_to_ids("none").shape == lang.images_in([1, 2], vocabulary).shape == (0, 32)


def test_the_prompt_is_that_of_the_model_on_vicuna():
    image = lang.ids_to_text(IMAGES[0])
    assert lang.prompt("What is this?", IMAGES[:1]) == f"<s>USER: {image}What is this?\nASSISTANT:"
    assert lang.prompt("Draw a cat.") == "<s>USER: Draw a cat.\nASSISTANT:"


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: lang.text_to_ids("<img>" + "<img_00001>" * 31 + "</img>"), "an image of 32 words, got 31"),
        (lambda: lang.text_to_ids("<img>" + "<img_00001>" * 31 + "<img_08192></img>"), "got <img_08192>"),
        (lambda: lang.text_to_ids("<img>" + "<img_00001>" * 31 + "a cat</img>"), "got also 'acat'"),
        (lambda: lang.text_to_ids("<img>" + "<img_00001>" * 31 + "<img_1></img>"), "got also"),
        (lambda: lang.text_to_ids("<img>" + "<img_00001>" * 32), "expected </img> behind <img>, the text has none"),
        (lambda: lang.images_in([40192, *[32000] * 31, 40193], lang.seed_vocabulary()), "of 32 words, got 31"),
        (lambda: lang.images_in([40192, *[32000] * 32], lang.seed_vocabulary()), "the ids have none"),
        (lambda: lang.images_in([40192, *[31999] * 32, 40193], lang.seed_vocabulary()), r"32000\.\.40191"),
        (lambda: lang.ids_to_text([0, 8192]), r"must be in 0\.\.8191, got 0 to 8192"),
        (lambda: lang.ids_to_text([0.5]), "integers"),
    ],
)
def test_what_is_no_image_is_refused(call, complaint):
    with pytest.raises(ZooError, match=complaint):
        call()

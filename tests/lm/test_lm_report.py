"""What the report says of captions and pictures."""

import json
import math

import pytest
import torch
from lm_helpers import make, make_codes

import zoo
from zoo.data import Loader, scenes
from zoo.lm.report import caption_rows, caption_scores, facts_of_caption, facts_of_scenes, preferred, report

FIELDS = ["image", "caption", "count", "objects", "floor"]


def some(split, count):
    batch = next(iter(Loader(scenes(split), batch_size=count, fields=FIELDS)))
    return batch | {"count": torch.tensor(batch["count"])}


@pytest.fixture(scope="module")
def val():
    return some("val", 100)


def test_true_captions_say_what_is_in_their_scenes(val):
    assert [facts_of_caption(caption) for caption in val["caption"]] == facts_of_scenes(val)
    rows = caption_rows(val["caption"], val, val)
    assert rows["model"] == rows["true"]
    assert set(rows["true"].values()) == {1.0}
    assert all(value < 0.6 for value in rows["of others"].values())
    assert rows["usual"]["number stated"] == val["count"].bincount().max().item() / 100


def test_a_caption_is_taken_apart():
    text = (
        "Two objects on a pale blue floor in front of red walls: two large red metal cubes, a cone, a small blue ring."
    )
    count, floor, objects = facts_of_caption(text)
    assert (count, floor) == (2, "pale blue")
    assert objects == {("large", "red", "metal", "cube"): 2, ("", "", "", "cone"): 1, ("small", "blue", "", "ring"): 1}
    assert facts_of_caption("nonsense 17") == (None, None, {})


def test_objects_count_as_often_as_they_are_named():
    true = [facts_of_caption("Three objects on a white floor: two large red metal cubes and a small blue matte ring.")]
    said = [facts_of_caption("Two objects on a brown floor: a large red metal cube and a small green matte ring.")]
    found = caption_scores(said, true)
    assert found["number stated"] == found["number named"] == found["floor"] == found["colour, exact"] == 0
    assert (found["colour, precision"], found["colour, recall"]) == (1 / 2, 1 / 3)
    assert (found["shape, precision"], found["shape, recall"]) == (1, 2 / 3)
    assert (found["object, precision"], found["object, recall"]) == (1 / 2, 1 / 3)


@pytest.mark.parametrize("kind", ["codes", "latents", "codes that are only read"])
def test_a_model_is_measured_in_both_directions(kind, val, tmp_path, capsys):
    longer = {"max_position_embeddings": 512}
    tokenizer = zoo.load_tokenizer("karl-tiny") if kind == "codes that are only read" else "plain"
    model = make(longer) if kind == "latents" else make_codes(tokenizer, lm=longer)
    few = {name: value[:6] for name, value in val.items()}
    found = report(model, some("train", 40), few, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(found))
    assert (tmp_path / "pairs.png").is_file()
    assert len(found["captions"]) == 6
    assert found["captions from images"]["true"]["object, exact"] == 1
    if kind == "codes that are only read":
        assert "no images are judged" in capsys.readouterr().out
        assert "images from captions" not in found
        return
    rows = found["images from captions"]
    assert rows.keys() == {"model", "of others", "rebuilt", "real", "usual"}
    assert rows["real"]["image to text, recall@1"] > 0.5
    assert all(0 <= value <= 1 or math.isnan(value) for row in rows.values() for value in row.values())


def test_pictures_are_nearer_to_their_caption_than_to_a_false_one(val):
    encoder = zoo.load_encoder("siglip-tiny")
    captions = val["caption"]
    right = preferred(encoder, val["image"], captions)
    assert set(right) == {"told from another colour", "told from another number"}
    assert right["told from another colour"] > 0.9
    assert right["told from another number"] > 0.6
    grey = preferred(encoder, torch.full_like(val["image"], 0.5), captions)
    assert grey["told from another colour"] < 0.75

"""What the report says of captions and pictures, and of several models in one table."""

import json

import pytest
import torch
from lm_helpers import make, make_codes

import zoo
from zoo.data import Loader, scenes
from zoo.errors import ZooError
from zoo.lm import compare as comparison
from zoo.lm.facts import fact_scores, facts_of_caption, facts_of_scenes
from zoo.lm.judge import judge_file, load_judge
from zoo.lm.report import about_tokens, caption_rows, picture_rows, preferred, report

FIELDS = ["image", "depth", "caption", "count", "objects", "floor"]


def some(split, count):
    batch = next(iter(Loader(scenes(split), batch_size=count, fields=FIELDS)))
    return batch | {"count": torch.tensor(batch["count"])}


def first(batch, count):
    return {name: value[:count] for name, value in batch.items()}


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
    found = fact_scores(said, true)
    assert found["number stated"] == found["number named"] == found["floor"] == found["colour, exact"] == 0
    assert (found["colour, precision"], found["colour, recall"]) == (1 / 2, 1 / 3)
    assert (found["shape, precision"], found["shape, recall"]) == (1, 2 / 3)
    assert (found["object, precision"], found["object, recall"]) == (1 / 2, 1 / 3)


@pytest.mark.parametrize("kind", ["codes", "latents", "codes that are only read", "depth"])
def test_a_model_is_measured_in_both_directions(kind, val, tmp_path, capsys):
    longer = {"max_position_embeddings": 512}
    names = {"codes that are only read": "karl-tiny", "depth": "aurora-tiny"}
    tokenizer = zoo.load_tokenizer(names[kind]) if kind in names else "plain"
    model = make(longer) if kind == "latents" else make_codes(tokenizer, lm=longer)
    found = report(model, some("train", 40), first(val, 6), tmp_path)
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
    assert rows["real"]["shape, recall"] > 0.5
    assert all(0 <= value <= 1 for row in rows.values() for value in row.values())
    in_colour = {"floor", "colour, recall", "image to text, recall@1", "told from another colour"}
    assert in_colour & rows["real"].keys() == (set() if kind == "depth" else in_colour)


def test_pictures_of_other_captions_are_judged_to_be_wrong(val):
    judge, encoder = load_judge(judge_file("image")), zoo.load_encoder("siglip-tiny")
    few = first(val, 50)
    pictures = {"real": few["image"], "of others": few["image"].roll(1, 0)}
    rows = picture_rows(pictures, few["caption"], judge, encoder, val)
    for name, value in rows["of others"].items():
        assert value < rows["real"][name] or name == "object, exact", name


def test_pictures_are_nearer_to_their_caption_than_to_a_false_one(val):
    encoder = zoo.load_encoder("siglip-tiny")
    captions = val["caption"]
    right = preferred(encoder, val["image"], captions)
    assert set(right) == {"told from another colour", "told from another number"}
    assert right["told from another colour"] > 0.9
    assert right["told from another number"] > 0.6
    grey = preferred(encoder, torch.full_like(val["image"], 0.5), captions)
    assert grey["told from another colour"] < 0.75


def test_what_an_image_takes():
    residual = about_tokens(make_codes("residual", by_direction=True))
    assert (residual["tokens"], residual["words read"], residual["words written"]) == (4, 2 + 4 * 2, 2 + 4 * 3)
    assert residual["bits per pixel"] == pytest.approx(4 * 3 * 2.321928 / 16**2)
    model = make()
    latents = about_tokens(model)
    assert (latents["tokens"], latents["words read"], latents["words written"]) == (4, 6, 6)
    assert latents["bits per pixel"] == 4 * 4 * 32 / 16**2
    assert latents["parameters learned"] == sum(p.numel() for p in model.parameters() if p.requires_grad)


# Several models


@pytest.fixture(scope="module")
def runs(tmp_path_factory, zoo_command):
    """Of two steps each."""
    folder = tmp_path_factory.mktemp("runs")
    options = [
        *("experiment=lm", "trainer.max_steps=2", "trainer.limit_val_batches=0", "data.batch_size=2"),
        "data.train.split=val",  # of fewer captions
        *("module.lm.hidden_size=16", "module.lm.num_hidden_layers=1", "module.lm.intermediate_size=16"),
        *("module.text_tokenizer.vocab_size=300", "callbacks.best=null", "callbacks.progress=null"),
        *("module.head.condition_dim=16", "module.head.width=16", "module.head.depth=1", "schedule.warmup_steps=0"),
    ]
    for name in ("kl-tiny", "aurora-tiny"):
        zoo_command("train", *options, f"tokenizer={name}", f"output_dir={folder / name}")
    return [folder / "kl-tiny", folder / "aurora-tiny"]


def test_models_stand_in_one_table_and_each_is_measured_once(runs, val, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(comparison, "read_scenes", lambda: (some("train", 40), first(val, 8)))
    measured, made = [], comparison.report
    monkeypatch.setattr(comparison, "report", lambda *args, **more: measured.append(args[3]) or made(*args, **more))
    found = comparison.compare(runs, tmp_path)
    assert measured == [run / "report" for run in runs]
    assert found["budget"]["steps"] == 2
    assert json.loads((tmp_path / "comparison.json").read_text()) == json.loads(json.dumps(found))
    assert (tmp_path / "comparison.png").is_file()
    lines = [line.split("|")[1:-1] for line in (tmp_path / "comparison.md").read_text().splitlines()]
    assert [cell.strip() for cell in lines[0]] == ["", "kl-tiny", "aurora-tiny"]
    table = {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines[2:]}
    assert table["tokens of an image"] == ["64", "64"]
    assert table["bits per pixel, written"] == ["4", "0.109"]
    real = found["models"][0]["images from captions"]["real"]
    assert table["own caption among the 5 nearest of 512"][0] == f"{real['image to text, recall@5']:.3f}"
    assert table["floor"][1] == ""  # depth maps do not show it
    assert "kl-tiny" in capsys.readouterr().out

    assert comparison.compare(runs, tmp_path) == found
    assert len(measured) == 2
    made = lambda *args, **more: found["models"][0]  # noqa: E731
    comparison.compare(runs[:1], tmp_path, text_scale=1.0)
    assert len(measured) == 3


def test_runs_of_different_budgets_are_not_compared(runs, tmp_path):
    other = tmp_path / "other"
    (other / "model").mkdir(parents=True)
    text = (runs[0] / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("max_steps: 2", "max_steps: 3"))
    with pytest.raises(ZooError, match="were trained with different steps; compare runs of one budget"):
        comparison.compare([runs[0], other], tmp_path)
    with pytest.raises(ZooError, match=r"has no config.yaml and model/, as zoo train leaves them"):
        comparison.compare([tmp_path], tmp_path)

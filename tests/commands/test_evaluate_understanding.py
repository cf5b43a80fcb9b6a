"""What a tokenizer or an encoder understands, through the true command, on a few embedded scenes and small folders."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import zoo
from zoo.commands.evaluate import main
from zoo.data import read_all, scenes
from zoo.data.labels import COLOR_NAMES, dominant_color, values_present
from zoo.metrics.probe import linear_probe

LIMIT = 60
SHAPES = ("sphere", "cube", "cylinder", "cone", "ring")
QUIET = ["device=cpu", "data.num_workers=0"]


def evaluate(folder, *overrides):
    assert main([*QUIET, f"output_dir={folder}", *overrides]) == 0
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def encoder():
    return zoo.load_encoder("siglip-tiny")


@pytest.fixture(scope="module")
def parts():
    fields = ["image", "caption", "objects", "count"]
    parts = (read_all(scenes(split), fields) for split in ("train", "val"))
    return [{name: values[:LIMIT] for name, values in part.items()} for part in parts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Plain pictures in the sub-folders blue and red, for training and validation, and one that is in none."""
    root = tmp_path_factory.mktemp("plain")
    draw = np.random.RandomState(0)
    for name, colour in (("blue", (30, 60, 220)), ("red", (210, 30, 30))):
        for split in ("train", "val"):
            (root / split / name).mkdir(parents=True)
            for i in range(6):
                pixels = (np.array(colour) + draw.randint(-20, 20, (64, 64, 3))).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")
    (root / "flat").mkdir()
    Image.fromarray(pixels.astype(np.uint8)).save(root / "flat/0.png")
    return root


def test_zeroshot_is_retrieval_and_classes_by_texts(tmp_path, capsys, encoder, parts):
    report = evaluate(tmp_path, "task=zeroshot", "encoder=siglip-tiny", f"limit={LIMIT}", "batch_size=16", "pictures=3")
    protocol, (ours, chance) = report["protocol"], report["rows"]
    assert (protocol["encoder"], protocol["images"], protocol["split"]) == ("siglip-tiny", LIMIT, "val")
    assert len(protocol["weights"]["sha256"]) == 64
    assert "tokenizer" not in protocol
    val = parts[1]
    images, texts = encoder.encode_image(val["image"]), encoder.encode_text(val["caption"])
    order = (images @ texts.T).argsort(1, descending=True).tolist()
    for k in (1, 5):
        found = sum(i in ranked[:k] for i, ranked in enumerate(order)) / LIMIT
        assert ours["metrics"][f"image_to_text_recall@{k}"] == pytest.approx(found)
        assert chance["metrics"][f"text_to_image_recall@{k}"] == pytest.approx(k / LIMIT)
    prototypes = []
    for color in COLOR_NAMES:
        things = [f"{material} {shape}" for material in ("matte", "glossy", "metal") for shape in SHAPES]
        texts = [f"A picture of one object on a white floor: a large {color} {thing}." for thing in things]
        prototypes.append(encoder.encode_text(texts).mean(0))
    guesses = (images @ F.normalize(torch.stack(prototypes), dim=1).T).argsort(1, descending=True)
    colors = dominant_color(val)[:, None]
    for k in (1, 5):
        right = (guesses[:, :k] == colors).any(1).double().mean().item()
        assert ours["metrics"][f"top{k}/colour of the largest"] == pytest.approx(right)
    assert 0 < ours["metrics"]["top1/number of objects"] < ours["metrics"]["top5/number of objects"]
    assert protocol["texts"]["number of objects"]["classes"] == 8
    assert Image.open(tmp_path / "retrieval.png").width > 500
    assert "image to text, recall at 1 ↑" in capsys.readouterr().out


@pytest.mark.parametrize("pool", ["mean", "whole"])
def test_a_probe_is_fitted_on_training_and_judged_on_validation_features(tmp_path, parts, pool):
    report = evaluate(tmp_path, "task=probe", "tokenizer=mingtok-tiny", f"limit={LIMIT}", f"pool={pool}")
    tokenizer = zoo.load_tokenizer("mingtok-tiny")
    assert report["protocol"]["images"] == report["protocol"]["training_images"] == LIMIT
    assert report["protocol"]["pool"] == pool
    pooled = (lambda x: x.mean(1)) if pool == "mean" else (lambda x: x.flatten(1))
    train, val = (pooled(tokenizer.features(part["image"])) for part in parts)
    counts, colors = ([f(part) for part in parts] for f in (lambda part: part["count"] - 1, dominant_color))
    targets = [F.one_hot(counts[0]), F.one_hot(colors[0])]
    targets += [values_present(parts[0], name).long() for name in ("color", "material", "shape", "size")]
    scores = linear_probe(train, torch.cat(targets, 1), val)
    ours, thumbnail, frequent = (row["metrics"] for row in report["rows"])
    assert ours["number of objects"] == pytest.approx((scores[:, :8].argmax(1) == counts[1]).double().mean().item())
    assert thumbnail["number of objects"] != ours["number of objects"]
    most = counts[0].bincount().argmax()
    assert frequent == {
        "number of objects": pytest.approx((counts[1] == most).double().mean().item()),
        "colour of the largest": pytest.approx((colors[1] == colors[0].bincount().argmax()).double().mean().item()),
    }


def test_an_encoder_is_probed_like_a_tokenizer(tmp_path):
    report = evaluate(tmp_path, "task=probe", "encoder=siglip-tiny", "limit=20", "baseline=false")
    assert [row["name"] for row in report["rows"]] == ["siglip-tiny"]


def test_classes_of_folders_are_named_by_a_file_and_templates(tmp_path, folder, encoder):
    names, templates = tmp_path / "names.txt", ["an image of a {} sphere", "{}"]
    names.write_text("blue\nred\n\n")
    labels = ["labels=classes", f"labels.classes={names}", "labels.templates=['an image of a {} sphere','{}']"]
    data = ["data=folder", f"data.path={folder}/val"]
    report = evaluate(tmp_path, "task=zeroshot", "encoder=siglip-tiny", *data, *labels, "batch_size=5")
    classifier = []
    for name in ("blue", "red"):
        classifier.append(encoder.encode_text([template.replace("{}", name) for template in templates]).mean(0))
    paths = sorted((folder / "val").rglob("*.png"))
    images = torch.stack([torch.from_numpy(np.array(Image.open(path))).movedim(-1, 0) / 255 for path in paths])
    guesses = (encoder.encode_image(images) @ F.normalize(torch.stack(classifier), dim=1).T).argmax(1)
    right = (guesses == torch.tensor([0] * 6 + [1] * 6)).double().mean().item()
    assert report["rows"][0]["metrics"] == {"top1/class": pytest.approx(right)}
    assert report["protocol"]["texts"]["class"]["templates"] == 2
    assert report["protocol"]["images"] == 12
    assert (tmp_path / "retrieval.png").is_file()


def test_classes_of_folders_are_probed(tmp_path, folder):
    data = ["data=folder", f"data.path={folder}/train", f"data.val_path={folder}/val", "labels=classes"]
    report = evaluate(tmp_path, "task=probe", "encoder=siglip-tiny", *data)
    assert [row["metrics"]["class"] for row in report["rows"]] == [1, 1, 0.5]


@pytest.mark.parametrize("task", ["zeroshot", "probe"])
def test_two_ranks_report_what_one_rank_reports(tmp_path, zoo_command, task):
    arguments = [f"task={task}", "encoder=siglip-tiny", "limit=51", "batch_size=8", *QUIET]
    printed = zoo_command("evaluate", *arguments, "devices=2", f"output_dir={tmp_path}/2")
    assert printed.count("metrics.json") == 1
    one, two = evaluate(tmp_path / "1", *arguments), json.loads((tmp_path / "2/metrics.json").read_text())
    assert one["protocol"] == two["protocol"]
    assert (one["run"]["devices"], two["run"]["devices"]) == (1, 2)
    for ours, theirs in zip(one["rows"], two["rows"], strict=True):
        assert theirs["metrics"] == pytest.approx(ours["metrics"], abs=1e-5)


FOLDER = ["data=folder", "data.path={folder}/val"]
FLAT = ["data=folder", "data.path={folder}/flat"]
ZEROSHOT, PROBE = (["encoder=siglip-tiny", f"task={task}", "limit=8"] for task in ("zeroshot", "probe"))


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["task=probe", "tokenizer=vqgan-tiny"], "vqgan-tiny has no features for understanding"),
        (["task=zeroshot", "tokenizer=mingtok-tiny"], "mingtok-tiny has no text side"),
        (["task=classify"], "task must be one of reconstruction, zeroshot, probe, got 'classify'"),
        (["encoder=siglip-tiny"], "siglip-tiny is an encoder, which reconstructs nothing"),
        ([*ZEROSHOT, *FOLDER], "say labels=captions where the samples have the field 'caption'"),
        ([*ZEROSHOT, *FLAT, "labels=captions"], "no 'caption' among its members png"),
        ([*PROBE, *FLAT, "labels=classes", "data.val_path={folder}/flat"], "no 'class' among its members png"),
        ([*PROBE, *FOLDER, "labels=classes"], "this data has no data.val"),
        ([*PROBE, *FOLDER, "labels=captions"], "captions alone are none; use labels=classes"),
        ([*ZEROSHOT, *FOLDER, "labels=classes"], "needs texts; give names of classes"),
        ([*ZEROSHOT, *FOLDER, "labels=classes", "labels.classes=[blue]", "limit=12"], "names for 1 classes"),
        ([*ZEROSHOT, *FOLDER, "labels=classes", "labels.classes=nowhere.txt"], "nowhere.txt"),
        ([*ZEROSHOT, *FOLDER, "labels=classes", "labels.classes=[]"], "labels.classes is empty"),
        (
            [*ZEROSHOT, *FOLDER, "labels=classes", "labels.classes=[a,b]", "labels.templates=[one]"],
            "labels.templates has 'one', without a {}",
        ),
        ([*ZEROSHOT, "stored_as=png"], "stored_as is for task=reconstruction"),
        ([*PROBE, "encode.quality=1"], "encode is for task=reconstruction"),
        ([*PROBE, "pool=max"], "pool must be one of mean, whole, got 'max'"),
        ([*PROBE, "limit=0"], "limit must be an integer of at least 1"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, folder, capfd, overrides, complaint):
    overrides = [one.replace("{folder}", str(folder)) for one in overrides]
    assert main([*QUIET, f"output_dir={tmp_path}", *overrides]) == 2
    error = capfd.readouterr().err.strip()
    assert complaint in error
    assert len(error.splitlines()) == 1, error

import io
import itertools
import json
import math
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zoo.data import render
from zoo.errors import ZooError

EMBEDDED = Path(render.__file__).parent / "embedded"


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


@pytest.fixture(scope="module")
def samples() -> dict[str, dict[str, bytes]]:
    """{key: {rgb.webp, depth.png, json}} of every embedded scene."""
    grouped = {}
    for path in sorted(EMBEDDED.glob("*.tar")):
        for name, content in members(path).items():
            key, kind = name.split(".", 1)
            grouped.setdefault(key, {})[kind] = content
    return grouped


@pytest.fixture(scope="module")
def scenes(samples) -> dict[str, dict]:
    return {key: json.loads(sample["json"]) for key, sample in samples.items()}


def test_a_scene_is_the_same_whatever_the_processes_and_shards(tmp_path):
    render.main(f"{tmp_path} --split val --count 3 --size 16 --samples 4 --processes 2 --shard-size 2".split())
    written = [members(tmp_path / f"scenes-val-000{shard}.tar") for shard in range(2)]
    assert [len(shard) for shard in written] == [6, 3]
    for index in (2, 0, 1):
        for kind, content in render.render(index, seed=0, split="val", size=16, samples=4).items():
            assert written[index // 2][f"val-00000{index}.{kind}"] == content


def test_shards_that_are_finished_are_left_alone(tmp_path):
    finished = tmp_path / "scenes-val-0000.tar"
    finished.write_bytes(b"kept")
    render.main(f"{tmp_path} --split val --count 1 --size 16 --samples 4 --processes 1".split())
    assert finished.read_bytes() == b"kept"
    assert list(tmp_path.iterdir()) == [finished]


def test_depth_is_the_distance_along_the_axis_of_the_camera():
    scene, _ = render.make_scene(0, "val", 1)
    depth, owner = render.geometry(scene, 64)
    axis = np.subtract(scene.target, scene.camera)
    axis /= np.linalg.norm(axis)
    right = np.cross(axis, [0, 0, 1])
    right /= np.linalg.norm(right)
    # The floor by hand: the ray of a pixel has unit length along the axis, so it meets z = 0 at that multiple.
    x, y = np.meshgrid(*[(np.arange(64) + 0.5) / 32 - 1] * 2) * np.array(math.tan(math.radians(scene.fov / 2)))
    rays = axis + x[..., None] * right - y[..., None] * np.cross(right, axis)
    floor = -scene.camera[2] / rays[..., 2]
    bottom = (owner == -1) & (np.arange(64)[:, None] > 48)
    assert bottom.sum() > 100
    assert np.allclose(depth[bottom], floor[bottom], rtol=1e-4)
    assert (depth[owner >= 0] < floor[owner >= 0] + 1e-4).all()


def test_objects_do_not_intersect_and_stay_inside_the_room():
    for index in range(200):
        scene = render.draw(np.random.default_rng(index), 1 + index % 8)
        for a, b in itertools.combinations(scene.objects, 2):
            assert math.dist(a.position, b.position) > a.radius + b.radius
        left, right, front, back = scene.room
        for o in scene.objects:
            x, y = o.position
            assert -left + o.radius < x < right - o.radius
            assert -front + o.radius < y < back - o.radius


def test_the_scene_does_not_depend_on_the_size_of_the_picture():
    small, large = (json.loads(render.render(3, 0, "val", size, 1)["json"]) for size in (16, 96))
    assert small["count"] == large["count"]
    for a, b in zip(small["objects"], large["objects"], strict=True):
        assert [a[k] for k in render.ATTRIBUTES] == [b[k] for k in render.ATTRIBUTES]
        assert np.allclose(a["box"], b["box"], atol=0.04)


def test_an_object_is_named_only_by_words_that_fit_it_alone():
    red, blue = ({"size": "small", "color": c, "material": "matte", "shape": "cube"} for c in ("red", "blue"))
    rng = np.random.default_rng(0)
    assert render.name([red, blue], 0, rng) == "red object"
    assert render.name([red, blue], 0, rng, without="color") is None
    assert render.name([red, red], 0, rng) is None


@pytest.mark.parametrize("wrong", ["--count 0", "--size -1", "--samples 0", "--processes 0", "--shard-size 0"])
def test_a_number_below_one_is_refused(tmp_path, wrong):
    with pytest.raises(ZooError, match=wrong.split()[0]):
        render.main([str(tmp_path), *wrong.split()])


def test_without_mitsuba_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mitsuba", None)
    render.mitsuba.cache_clear()
    with pytest.raises(ZooError, match=r"tokenizer-zoo\[render\]"):
        render.mitsuba()


def test_the_embedded_shards_are_complete_and_small(samples):
    assert sorted(samples) == [f"train-{i:06d}" for i in range(4096)] + [f"val-{i:06d}" for i in range(512)]
    assert all(sorted(sample) == ["depth.png", "json", "rgb.webp"] for sample in samples.values())
    assert sum(path.stat().st_size for path in EMBEDDED.iterdir()) <= 48e6


def test_the_embedded_pictures_can_be_decoded_and_have_a_depth_everywhere(samples):
    for key in itertools.islice(samples, 0, None, 16):
        rgb, depth = (np.asarray(Image.open(io.BytesIO(samples[key][kind]))) for kind in ("rgb.webp", "depth.png"))
        assert rgb.shape == (64, 64, 3), key
        assert depth.shape == (64, 64), key
        assert depth.dtype == np.uint16, key
        assert depth.min() > 300, key
        assert depth.max() < 20000, key
        assert rgb.std() > 5, key


def test_boxes_and_depths_of_the_embedded_objects_agree_with_the_depth_picture(samples, scenes):
    for key in itertools.islice(samples, 0, None, 16):
        depth = np.asarray(Image.open(io.BytesIO(samples[key]["depth.png"]))) * render.DEPTH_SCALE
        for o in scenes[key]["objects"]:
            x0, y0, x1, y1 = (np.array(o["box"]) * 64).round().astype(int)
            inside = depth[y0:y1, x0:x1]
            assert np.abs(inside - o["depth"]).min() < 1e-3, key
            assert render.MIN_VISIBLE <= round(o["visible"] * 64 * 64) <= inside.size, key


def test_every_caption_gives_the_number_and_every_object(scenes):
    for key, scene in scenes.items():
        assert f"{render.NUMBERS[scene['count']]} object" in scene["caption"].lower(), key
        assert scene["count"] == len(scene["objects"])
        said = {}
        for number, words in re.findall(r"\b(a|[a-z]+) ((?:small|large) \w+ \w+ \w+?)s?\b", scene["caption"].lower()):
            said[words] = said.get(words, 0) + (1 if number == "a" else render.NUMBERS.index(number))
        there = {}
        for o in scene["objects"]:
            words = " ".join(o[a] for a in render.ATTRIBUTES)
            there[words] = there.get(words, 0) + 1
        assert said == there, key


def test_every_answer_follows_from_the_objects(scenes):
    def matching(phrase, objects):
        words = [w for w in phrase.split() if w != "object"]
        return [o for o in objects if all(w in (o[a] for a in render.ATTRIBUTES) for w in words)]

    for key, scene in scenes.items():
        for question, answer in scene["questions"]:
            if found := re.fullmatch(r"How many (.+)s are there\?", question):
                assert answer == str(len(matching(found[1], scene["objects"]))), (key, question)
            elif found := re.fullmatch(r"Which is nearer, the (.+) or the (.+)\?", question):
                (first,), (second,) = (matching(phrase, scene["objects"]) for phrase in found.groups())
                assert answer == found[1 if first["depth"] < second["depth"] else 2], (key, question)
                near, far = sorted((first["depth"], second["depth"]))
                assert near <= 0.9 * far, (key, question)
            else:
                kind, phrase = re.fullmatch(
                    r"(?:What|Is) (.*?) ?(?:is )?the (.+?)(?: small or large)?\?", question
                ).groups()
                (only,) = matching(phrase, scene["objects"])
                assert answer == only[kind or "size"], (key, question)


def test_every_number_of_objects_is_about_equally_frequent(scenes):
    counts = np.bincount([scene["count"] for key, scene in scenes.items() if key.startswith("train")], minlength=9)
    assert counts[0] == 0
    assert np.abs(counts[1:] / 512 - 1).max() < 0.15

"""Renders the table-top scenes: colour, exact depth, boxes, attributes, a caption and questions with answers.

    python -m zoo.data.render output_dir --split train --count 4096

Scene i is a pure function of (seed, split, i): the same whatever the processes, the shards and the size of the picture.
Needs Mitsuba 3 (pip install 'tokenizer-zoo[render]').
"""

import argparse
import io
import itertools
import json
import math
import multiprocessing
import os
import sys
import tarfile
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track

from zoo.errors import ZooError
from zoo.files import writing

SPLITS = ("train", "val")
DEPTH_SCALE = 0.001  # metres per step of the 16-bit depth picture
MIN_VISIBLE = 30  # pixels of an object in the 64x64 index map, or the scene is drawn again
MAX_OBJECTS = 8

SHAPES = ("sphere", "cube", "cylinder", "cone", "ring")
SIZES = {"small": 0.16, "large": 0.24}  # radius in metres
MATERIALS = ("matte", "glossy", "metal")
COLORS = {  # sRGB
    "red": (0.82, 0.10, 0.10),
    "orange": (0.95, 0.48, 0.08),
    "yellow": (0.93, 0.83, 0.12),
    "green": (0.15, 0.62, 0.20),
    "cyan": (0.12, 0.76, 0.80),
    "blue": (0.14, 0.30, 0.88),
    "purple": (0.54, 0.20, 0.76),
    "pink": (0.95, 0.50, 0.70),
}
ROOM_COLORS = {  # muted, so that objects stand out
    "white": (0.82, 0.82, 0.81),
    "light gray": (0.66, 0.66, 0.67),
    "dark gray": (0.36, 0.36, 0.38),
    "beige": (0.78, 0.71, 0.60),
    "brown": (0.48, 0.38, 0.31),
    "pale blue": (0.60, 0.68, 0.78),
    "pale green": (0.62, 0.72, 0.62),
    "lavender": (0.70, 0.65, 0.77),
}
ATTRIBUTES = ("size", "color", "material", "shape")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")


@dataclass(frozen=True)
class Object:
    shape: str
    color: str
    material: str
    size: str
    position: tuple[float, float]  # metres on the floor
    angle: float  # degrees about the vertical

    @property
    def radius(self) -> float:
        """Of the vertical cylinder around the object, in metres."""
        return SIZES[self.size]


@dataclass(frozen=True)
class Scene:
    objects: tuple[Object, ...]
    floor: str
    walls: str
    room: tuple[float, float, float, float]  # metres from the origin to the walls at -x, +x, -y, +y
    camera: tuple[float, float, float]
    target: tuple[float, float, float]
    fov: float  # degrees
    light: tuple[float, float, float]
    light_size: float  # half its edge in metres
    light_color: tuple[float, float, float]
    exposure: float


# --- drawing a scene -------------------------------------------------------------------------------------------------


def place(radii: list[float], rng: np.random.Generator) -> np.ndarray:
    """(N, 2) centres of circles 3 cm or more apart, about the origin, in an ellipse that grows until they fit. It is
    longer along x, the direction of view, which the picture foreshortens."""
    spread, centres = 0.5 * math.sqrt(sum(r * r for r in radii)), []
    while len(centres) < len(radii):
        angle, length = rng.uniform(0, math.tau), spread * math.sqrt(rng.random())
        centre = length * np.array([1.25 * math.cos(angle), 0.8 * math.sin(angle)])
        gaps = [math.dist(centre, c) - r - radii[len(centres)] for c, r in zip(centres, radii, strict=False)]
        if all(gap > 0.03 for gap in gaps):
            centres.append(centre)
        else:
            spread *= 1.005
    centres = np.stack(centres)
    return centres - (centres.min(0) + centres.max(0)) / 2


def draw(rng: np.random.Generator, count: int) -> Scene:
    """One scene of `count` objects, framed so that all of them are inside the picture and as large as that allows."""
    sizes = rng.choice(list(SIZES), count)
    azimuth, elevation, fov = rng.uniform(0, math.tau), math.radians(rng.uniform(24, 50)), rng.uniform(34, 52)
    c, s = math.cos(azimuth), math.sin(azimuth)
    toward, right = np.array([[c, s, 0], [-s, c, 0]])
    centres = place([SIZES[size] for size in sizes], rng) @ np.stack([toward, right])[:, :2]
    objects = tuple(
        Object(
            shape=str(rng.choice(list(SHAPES))),
            color=str(rng.choice(list(COLORS))),
            material=str(rng.choice(list(MATERIALS))),
            size=str(size),
            position=tuple(centre.tolist()),
            angle=rng.uniform(0, 360),
        )
        for size, centre in zip(sizes, centres, strict=True)
    )

    target = np.array([*rng.uniform(-0.25, 0.25, 2) / count, rng.uniform(0.1, 0.2)])
    back = toward * math.cos(elevation) + np.array([0, 0, math.sin(elevation)])
    up = np.cross(back, right)
    # The smallest distance at which every bounding sphere lies inside the four planes of the frame.
    half = math.radians(0.97 * fov / 2)
    distance = 1.15
    for o in objects:
        p = np.array([*o.position, o.radius]) - target
        for side in (abs(p @ right), abs(p @ up)):
            distance = max(distance, (side * math.cos(half) + 1.04 * o.radius) / math.sin(half) + p @ back)
    camera = target + back * distance * rng.uniform(1.0, 1.06)

    high, around = math.radians(rng.uniform(55, 80)), rng.uniform(0, math.tau)
    light = 2.9 * np.array([math.cos(around) * math.cos(high), math.sin(around) * math.cos(high), math.sin(high)])
    ends = np.array([0.4 - camera, 0.4 + camera, 1.0 - light, 1.0 + light])  # the room holds the camera and the light
    room = np.maximum(rng.uniform(1.7, 3.2, 4), ends.reshape(2, 2, 3).max(0)[:, :2].T.ravel())
    warmth = rng.uniform(-0.06, 0.06)
    floor, walls = rng.choice(list(ROOM_COLORS), 2, replace=False)
    return Scene(
        objects=objects,
        floor=str(floor),
        walls=str(walls),
        room=tuple(room.tolist()),
        camera=tuple(camera.tolist()),
        target=tuple(target.tolist()),
        fov=fov,
        light=tuple(light.tolist()),
        light_size=rng.uniform(0.45, 0.7),
        light_color=(1 + warmth, 1.0, 1 - warmth),
        exposure=rng.uniform(0.95, 1.25),
    )


def make_scene(seed: int, split: str, index: int) -> tuple[Scene, np.random.Generator]:
    """The scene of that index, every object of it well visible, and the generator for what is said about it."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    count = int(rng.integers(1, MAX_OBJECTS + 1))
    while True:
        scene = draw(rng, count)
        _, owner = geometry(scene, 64)
        if np.bincount(owner.ravel() + 1, minlength=count + 1)[1:].min() >= MIN_VISIBLE:
            return scene, rng


# --- Mitsuba ---------------------------------------------------------------------------------------------------------


@cache
def mitsuba():
    try:
        import drjit
        import mitsuba
    except ModuleNotFoundError:
        raise ZooError("rendering scenes needs Mitsuba 3: pip install 'tokenizer-zoo[render]'") from None
    drjit.set_thread_count(1)
    mitsuba.set_variant("scalar_rgb")
    return mitsuba


def linear(srgb: tuple[float, float, float]) -> dict:
    return {"type": "rgb", "value": [((c + 0.055) / 1.055) ** 2.4 for c in srgb]}


def bsdf(obj: Object) -> dict:
    color = linear(COLORS[obj.color])
    if obj.material == "matte":
        return {"type": "diffuse", "reflectance": color}
    # Rough enough that the light these two throw on the floor is free of specks at 64 samples.
    if obj.material == "glossy":
        return {"type": "roughplastic", "diffuse_reflectance": color, "alpha": 0.18}
    return {"type": "roughconductor", "specular_reflectance": color, "alpha": 0.35}


def outlines(shape: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """A solid of revolution of radius 1 on the floor: smooth pieces of (radius, height) points and normals."""
    if shape == "cylinder":
        r, top = 0.9, 1.7
        side = np.array([[r, 0], [r, top]]), np.array([[1, 0], [1, 0]])
        lid = np.array([[r, top], [0, top]]), np.array([[0, 1], [0, 1]])
        return [side, lid]
    if shape == "cone":
        return [(np.array([[1, 0], [0, 2]]), np.array([[2, 1], [2, 1]]) / math.sqrt(5))]
    angle = np.linspace(-math.pi, math.pi, 33)
    circle = np.stack([np.cos(angle), np.sin(angle)], 1)
    return [(0.34 * circle + [0.66, 0.34], circle)]


def lathe(obj: Object, sides: int = 64):
    """The mesh of a cylinder, cone or ring."""
    mi = mitsuba()
    angle = np.linspace(0, math.tau, sides + 1)
    turn = np.stack([np.cos(angle), np.sin(angle), np.ones_like(angle)], 1)
    vertices, normals, faces, start = [], [], [], 0
    for outline, normal in outlines(obj.shape):
        vertices.append((outline[:, None, [0, 0, 1]] * turn).reshape(-1, 3))
        normals.append((normal[:, None, [0, 0, 1]] * turn).reshape(-1, 3))
        corner = start + (np.arange(len(outline) - 1)[:, None] * (sides + 1) + np.arange(sides)).reshape(-1, 1)
        faces += [corner + [0, 1, sides + 2], corner + [0, sides + 2, sides + 1]]
        start += len(outline) * (sides + 1)
    vertices, normals, faces = (np.concatenate(x) for x in (vertices, normals, faces))
    properties = mi.Properties()
    properties["bsdf"] = mi.load_dict(bsdf(obj))
    mesh = mi.Mesh(obj.shape, len(vertices), len(faces), props=properties, has_vertex_normals=True)
    buffers = mi.traverse(mesh)
    buffers["vertex_positions"] = (vertices * obj.radius + [*obj.position, 0]).ravel()
    buffers["vertex_normals"] = normals.ravel()
    buffers["faces"] = faces.ravel()
    buffers.update()
    return mesh


def solid(obj: Object):
    """What Mitsuba's scene takes for the object: a description or a mesh."""
    if obj.shape == "sphere":
        return {"type": "sphere", "center": [*obj.position, obj.radius], "radius": obj.radius, "bsdf": bsdf(obj)}
    if obj.shape == "cube":
        half = obj.radius / math.sqrt(2)
        stand = mitsuba().ScalarTransform4f().translate([*obj.position, half]).rotate([0, 0, 1], obj.angle)
        return {"type": "cube", "to_world": stand.scale(half), "bsdf": bsdf(obj)}
    return lathe(obj)


@lru_cache(maxsize=1)
def build(scene: Scene):
    """The Mitsuba scene without a camera; its first shapes are the objects, in order."""
    mi = mitsuba()
    left, right, front, back = scene.room
    floor = {"type": "diffuse", "reflectance": linear(ROOM_COLORS[scene.floor])}
    walls = {"type": "diffuse", "reflectance": linear(ROOM_COLORS[scene.walls])}
    # A faint glow, found by chance only: all shadow rays go to the lamp, where they matter.
    glow = {"type": "area", "radiance": {"type": "rgb", "value": 0.15}, "sampling_weight": 0.0}
    radiance = 0.62 * math.pi * scene.exposure * np.dot(scene.light, scene.light) / (4 * scene.light_size**2)
    light = {"type": "area", "radiance": {"type": "rgb", "value": (radiance * np.array(scene.light_color)).tolist()}}

    def plane(origin, target, half, **what):
        facing = mi.ScalarTransform4f().look_at(origin=origin, target=target, up=[0, 0.6, 0.8])
        return {"type": "rectangle", "to_world": facing.scale(half), **what}

    return mi.load_dict(
        {
            "type": "scene",
            **{f"object{i}": solid(o) for i, o in enumerate(scene.objects)},
            "floor": plane([0, 0, 0], [0, 0, 1], 12, bsdf=floor),
            "wall0": plane([-left, 0, 0], [0, 0, 0], 12, bsdf=walls),
            "wall1": plane([right, 0, 0], [0, 0, 0], 12, bsdf=walls),
            "wall2": plane([0, -front, 0], [0, 0, 0], 12, bsdf=walls),
            "wall3": plane([0, back, 0], [0, 0, 0], 12, bsdf=walls),
            "ceiling": plane([0, 0, 3.6], [0, 0, 0], 12, emitter=glow),
            "light": plane(scene.light, [0, 0, 0], scene.light_size, emitter=light),
        },
        parallel=False,
        optimize=False,  # merged meshes would share one shape index
    )


def expose(scene: Scene, size: int, integrator: dict, sampler: dict, rfilter: str, seed: int = 0) -> np.ndarray:
    """(H, W, C) float: what the integrator sees through the scene's camera."""
    mi = mitsuba()
    sensor = {
        "type": "perspective",
        "fov": scene.fov,
        "to_world": mi.ScalarTransform4f().look_at(origin=scene.camera, target=scene.target, up=[0, 0, 1]),
        "film": {"type": "hdrfilm", "width": size, "height": size, "rfilter": {"type": rfilter}},
        "sampler": sampler,
    }
    # One block a picture: the sampler is seeded by block.
    integrator = mi.load_dict(integrator | {"block_size": 2 ** math.ceil(math.log2(size))})
    return np.array(mi.render(build(scene), sensor=mi.load_dict(sensor), integrator=integrator, seed=seed))


@lru_cache(maxsize=2)
def geometry(scene: Scene, size: int) -> tuple[np.ndarray, np.ndarray]:
    """What the rays through the pixel centres hit: depth along the camera's axis in metres (H, W), and the number of
    the object, or -1 for the room (H, W)."""
    centres = {"type": "stratified", "sample_count": 1, "jitter": False}
    aovs = expose(scene, size, {"type": "aov", "aovs": "p:position,i:shape_index"}, centres, "box")
    axis = np.subtract(scene.target, scene.camera)
    depth = (aovs[..., :3] - np.array(scene.camera)) @ (axis / np.linalg.norm(axis))
    number = aovs[..., 3].astype(int) - 1  # Mitsuba counts from one
    return depth, np.where(number < len(scene.objects), number, -1)


def photograph(scene: Scene, size: int, samples: int, seed: int) -> np.ndarray:
    """(H, W, 3) uint8 sRGB. Highlights roll off instead of clipping."""
    pixels = {"type": "multijitter", "sample_count": samples}
    x = expose(scene, size, {"type": "path", "max_depth": 3}, pixels, "gaussian", seed)[..., :3]
    knee = 0.6
    x = np.where(x < knee, x, 1 - (1 - knee) * np.exp((knee - x) / (1 - knee)))
    x = np.where(x < 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)
    return np.round(255 * x).astype(np.uint8)


# --- words -----------------------------------------------------------------------------------------------------------


def measure(scene: Scene, depth: np.ndarray, owner: np.ndarray) -> list[dict]:
    """Attributes and what is seen of each object: box (x0, y0, x1, y1) and visible area relative to the picture, depth
    of its nearest visible point in metres."""
    objects = []
    for number, o in enumerate(scene.objects):
        seen = owner == number
        y, x = np.nonzero(seen)
        box = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) / len(owner)
        objects.append(
            {name: getattr(o, name) for name in ATTRIBUTES}
            | {
                "box": box.round(4).tolist(),
                "depth": round(float(depth[seen].min()), 3),
                "visible": round(float(seen.mean()), 4),
            }
        )
    return objects


def amount(number: int, noun: str) -> str:
    return f"{NUMBERS[number]} {noun}" + "s" * (number != 1)


def listing(objects: list[dict]) -> str:
    """'two large red metal cubes, a small blue matte cone and ...': equal neighbours are counted together."""
    parts = []
    for words, group in itertools.groupby(objects, key=lambda o: " ".join(o[a] for a in ATTRIBUTES)):
        n = len(list(group))
        parts.append(f"a {words}" if n == 1 else amount(n, words))
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)


def name(objects: list[dict], number: int, rng: np.random.Generator, without: str = "") -> str | None:
    """One of the shortest phrases that fits this object alone, not using the attribute `without`, or None."""
    usable = [a for a in ATTRIBUTES if a != without]
    for length in range(1, len(usable) + 1):
        unique = [
            chosen
            for chosen in itertools.combinations(usable, length)
            if sum(all(o[a] == objects[number][a] for a in chosen) for o in objects) == 1
        ]
        if unique:
            chosen = unique[rng.integers(len(unique))]
            return " ".join(objects[number][a] for a in chosen) + " object" * ("shape" not in chosen)
    return None


def caption(scene: Scene, objects: list[dict], rng: np.random.Generator) -> str:
    n = amount(len(objects), "object")
    by_words = sorted(objects, key=lambda o: [o[a] for a in ATTRIBUTES])
    by_side = sorted(objects, key=lambda o: o["box"][0] + o["box"][2])
    by_depth = sorted(objects, key=lambda o: o["depth"])
    floor, walls = f"a {scene.floor} floor", f"{scene.walls} walls"
    are, stand = ("is", "stands") if len(objects) == 1 else ("are", "stand")
    kinds = [
        f"{rng.choice(['A picture', 'An image', 'A rendering', 'A scene'])} of {n} on {floor}: {listing(by_words)}.",
        f"{n.capitalize()} on {floor} in front of {walls}: {listing(by_words)}.",
        f"In a room with {walls} and {floor} there {are} {n}: {listing(by_words)}.",
        f"{listing(by_words).capitalize()} {stand} on {floor}, {n} in all.",
    ]
    if len(objects) > 1:
        kinds += [
            f"From left to right, {n} {stand} on {floor}: {listing(by_side)}.",
            f"{n.capitalize()} on {floor}, from near to far: {listing(by_depth)}.",
        ]
    return kinds[rng.integers(len(kinds))]


def questions(objects: list[dict], rng: np.random.Generator) -> list[list[str]]:
    """[question, answer] pairs. Nothing is asked that cannot be told from the picture: an object is named only by words
    that fit it alone, and of two objects the nearer is at least 10 % and 10 cm closer."""

    def count(noun, **wanted):
        n = sum(all(o[a] == v for a, v in wanted.items()) for o in objects)
        return [f"How many {noun}s are there?", str(n)]

    def pick(attribute, names):  # mostly what is there, now and then what is not
        return str(rng.choice([o[attribute] for o in objects] if rng.random() < 0.75 else list(names)))

    color, shape = pick("color", COLORS), pick("shape", SHAPES)
    pairs = [count("object"), count(f"{color} object", color=color), count(shape, shape=shape)]

    def clear(a, b):
        return a["depth"] < min(0.9 * b["depth"], b["depth"] - 0.1)

    order = list(itertools.permutations(range(len(objects)), 2))
    near = [(i, j) for i, j in order if clear(objects[i], objects[j]) or clear(objects[j], objects[i])]
    asked = set()
    for i, j in rng.permutation(near).tolist() if near else []:
        first, second = name(objects, i, rng), name(objects, j, rng)
        if first and second and frozenset((i, j)) not in asked and len(asked) < 3:
            asked.add(frozenset((i, j)))
            nearer = first if objects[i]["depth"] < objects[j]["depth"] else second
            pairs.append([f"Which is nearer, the {first} or the {second}?", nearer])

    for attribute, question in (
        ("color", "What color is the {}?"),
        ("material", "What material is the {}?"),
        ("size", "Is the {} small or large?"),
        ("shape", "What shape is the {}?"),
    ):
        number = int(rng.integers(len(objects)))
        if phrase := name(objects, number, rng, without=attribute):
            pairs.append([question.format(phrase), objects[number][attribute]])
    return pairs


# --- samples and shards ----------------------------------------------------------------------------------------------


def render(index: int, seed: int, split: str, size: int, samples: int) -> dict[str, bytes]:
    """The members of sample `index` in a shard; README.md beside the embedded shards lists the fields."""
    scene, rng = make_scene(seed, split, index)
    depth, _ = geometry(scene, size)
    rgb = photograph(scene, size, samples, seed=int(rng.integers(2**31)))
    objects = measure(scene, *geometry(scene, max(size, 64)))
    words = {
        "count": len(objects),
        "caption": caption(scene, objects, rng),
        "questions": questions(objects, rng),
        "objects": objects,
        "floor": scene.floor,
        "walls": scene.walls,
        **{key: np.round(getattr(scene, key), 3).tolist() for key in ("camera", "target", "fov")},
    }
    color, steps = io.BytesIO(), io.BytesIO()
    Image.fromarray(rgb).save(color, "webp", lossless=True, quality=100, method=6)
    Image.fromarray(np.round(depth / DEPTH_SCALE).astype(np.uint16)).save(steps, "png", optimize=True)
    text = json.dumps(words, separators=(",", ":")).encode()
    return {"rgb.webp": color.getvalue(), "depth.png": steps.getvalue(), "json": text}


def write(path: Path, split: str, indices: range, samples) -> None:
    """A webdataset shard, the same bytes for the same samples; one that is there is a whole one."""
    with writing(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for index, sample in zip(indices, samples, strict=True):
            for kind, content in sample.items():
                member = tarfile.TarInfo(f"{split}-{index:06d}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m zoo.data.render", description="Render table-top scenes into shards."
    )
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--count", type=int, default=4096, help="scenes of the split")
    parser.add_argument("--size", type=int, default=64, help="pixels along an edge")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=64, help="light paths a pixel")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--shard-size", type=int, default=256, help="scenes a shard")
    options = parser.parse_args(arguments)
    for key in ("count", "size", "samples", "processes", "shard_size"):
        if getattr(options, key) < 1:
            raise ZooError(f"--{key.replace('_', '-')} must be 1 or more, not {getattr(options, key)}")
    mitsuba()  # says at once when it is missing

    options.output_dir.mkdir(parents=True, exist_ok=True)
    shards = {
        options.output_dir / f"scenes-{options.split}-{number:04d}.tar": range(
            start, min(start + options.shard_size, options.count)
        )
        for number, start in enumerate(range(0, options.count, options.shard_size))
    }
    work = partial(render, seed=options.seed, split=options.split, size=options.size, samples=options.samples)
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for path, indices in shards.items():
            if not path.exists():
                write(path, options.split, indices, track(pool.imap(work, indices), path.name, total=len(indices)))


if __name__ == "__main__":
    try:
        main()
    except ZooError as error:
        print(error, file=sys.stderr)
        sys.exit(2)

"""Files of weights that are damaged, lie about themselves, or try to run code."""

import json
import os
import pickle
import struct
import zipfile

import pytest
import torch
from fuzz_helpers import attempt, fuzz, refused, shipped
from hypothesis import example
from hypothesis import strategies as st
from safetensors.torch import save as serialize

import zoo
from zoo import Tokens, registry, weights
from zoo.commands.train import progress

SMALL = {"hidden_dim": 4, "codebook_dim": 8, "codebook_size": 16}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    return zoo.create_tokenizer("aurora-tiny", **SMALL)


@pytest.fixture(scope="module")
def files(folder, made):
    """The bytes of a whole file of each kind, and what reads it."""
    tokens = Tokens({"depth": torch.arange(128).view(2, 64) % 16}, grid=(8, 8))
    tokens.save(folder / "tokens.safetensors")
    registry.save(made, folder / "whole.safetensors")
    torch.save({"state_dict": made.state_dict()}, folder / "whole.pt")
    torch.save({"model": made.state_dict()}, folder / "old.pt", _use_new_zipfile_serialization=False)
    load = lambda path: zoo.load_tokenizer("aurora-tiny", path, **SMALL).state_dict()  # noqa: E731
    readers = {"whole.safetensors": load, "whole.pt": load, "old.pt": load, "tokens.safetensors": Tokens.load}
    return {name: ((folder / name).read_bytes(), reader) for name, reader in readers.items()}


def damaged(data, content):
    """Bytes as a bad disk, a broken copy or a bored person leaves them."""
    content = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        how = data.draw(st.sampled_from(["flip", "head", "tail", "cut", "insert", "repeat", "zero", "overwrite"]))
        size = len(content)
        if not size:
            break
        # half of all damage where the structure is: in the first or the last kilobyte
        near = st.integers(0, min(1000, size - 1)) | st.integers(max(0, size - 1000), size - 1)
        place = data.draw(near | st.integers(0, size - 1))
        if how in ("flip", "head", "tail"):
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "cut":
            del content[place:]
        elif how == "insert":
            content[place:place] = data.draw(st.binary(min_size=1, max_size=8))
        elif how == "repeat":
            content[place:place] = content[place : place + data.draw(st.integers(1, 1000))]
        elif how == "zero":
            content[place : place + 100] = bytes(len(content[place : place + 100]))
        else:
            new = data.draw(st.binary(min_size=1, max_size=8))
            content[place : place + len(new)] = new
    return bytes(content)


@pytest.mark.parametrize("name", ["whole.safetensors", "whole.pt", "old.pt", "tokens.safetensors"])
@fuzz(data=st.data())
def test_a_damaged_file_is_refused_or_has_the_right_form(files, folder, made, name, data):
    content, read = files[name]
    path = folder / f"damaged-{name}"
    path.write_bytes(changed := damaged(data, content))
    found = attempt(read, path)
    if isinstance(found, dict):  # what is taken is finite and fits, and of a file with checksums it is the same
        for key, tensor in made.state_dict().items():
            assert found[key].isfinite().all()
            assert found[key].shape == tensor.shape
            assert name != "whole.pt" or torch.equal(found[key], tensor)
    elif found is not None:
        assert changed == content or len(found) == len(found.ids["depth"])


@fuzz(data=st.data(), parts=st.dictionaries(st.sampled_from(["global_step", "train_row", "state_dict"]), JSON))
def test_a_training_does_not_go_on_from_a_damaged_checkpoint(folder, made, data, parts):
    path = folder / "last.ckpt"
    whole = {"global_step": 3, "train_row": {"loss": 1.0}, "state_dict": made.state_dict(), "optimizer_states": []}
    torch.save(whole, path)
    path.write_bytes(damaged(data, path.read_bytes()))
    found = attempt(progress, path)
    assert found is None or all(torch.equal(found["state_dict"][n], t) for n, t in made.state_dict().items())
    torch.save(whole | parts, path)
    found = attempt(progress, path)
    if found is not None:
        assert isinstance(found["global_step"], int)
        assert isinstance(found["train_row"], dict)
        attempt(weights.expect_fit, made, found["state_dict"], path)


def test_a_flipped_bit_in_weights_of_the_repository_is_noticed(tmp_path, monkeypatch):
    for kind, name in shipped("tokenizer", "encoder", "generator", "decoder"):
        names = next(one for one in registry.KINDS if one.kind == kind)
        path = names.weights_path(name)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        (tmp_path / path.name).write_bytes(content)
    monkeypatch.setattr(registry, "resource", lambda folder: tmp_path)
    for kind, name in shipped("tokenizer", "encoder", "generator", "decoder"):
        refused(getattr(zoo, f"load_{kind}"), name, says=["SHA-256", name])


@fuzz(
    changes=st.dictionaries(
        st.integers(0, 40),
        st.sampled_from(
            ["rename", "drop", "shape", "flat", "int", "half", "double", "complex", "nan", "inf", "bool", "huge"]
        ),
        min_size=1,
        max_size=3,
    ),
    pt=st.booleans(),
    nest=st.sampled_from([(), ("state_dict",), ("ema",), ("model", "module")]),
)
@example(changes={0: "complex"}, pt=True, nest=())
@example(changes={3: "inf"}, pt=False, nest=())
def test_weights_of_another_form_are_named(folder, made, changes, pt, nest):
    state = dict(made.state_dict())
    names, harmless = list(state), True
    for number, change in changes.items():
        name = names[number % len(names)]
        tensor = state.pop(name).clone()
        new = {
            "shape": lambda t=tensor: torch.cat([t, t]),
            "flat": lambda t=tensor: t.flatten()[None],
            "int": lambda t=tensor: t.int(),
            "half": lambda t=tensor: t.half(),
            "double": lambda t=tensor: t.double(),
            "complex": lambda t=tensor: t + 0j,
            "nan": lambda t=tensor: t * torch.nan,
            "inf": lambda t=tensor: t + torch.inf,
            "bool": lambda t=tensor: t.bool(),
            "huge": lambda t=tensor: torch.full_like(t, 1e300, dtype=torch.float64),
        }
        if change == "rename":
            state[f"{name}x"] = tensor
        elif change != "drop":
            state[name] = new[change]()
        harmless &= change in ("half", "double")
    path = folder / ("form.pt" if pt else "form.safetensors")
    content = state
    for key in reversed(nest):
        content = {key: content}
    torch.save(content, path) if pt else path.write_bytes(serialize({k: t.contiguous() for k, t in state.items()}))
    if harmless:
        zoo.load_tokenizer("aurora-tiny", path, **SMALL)
    else:
        refused(zoo.load_tokenizer, "aurora-tiny", path, says=[path.name], **SMALL)


OFFSETS = st.sampled_from([0, 1, 4, 8, 16, 2**31, 2**63, 2**64, -1]) | st.integers(0, 64)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "F4", "C64", "F64", "", "f32"]),
        "shape": st.lists(st.sampled_from([0, 1, 2, 4, 2**32, 2**62, -1]), max_size=4),
        "data_offsets": st.lists(OFFSETS, min_size=2, max_size=2),
    }
)


@fuzz(
    header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), ENTRIES | JSON, max_size=3) | JSON,
    length=st.none() | st.sampled_from([0, 1, 2**31, 2**63, 2**64 - 1, 100_000_001]),
    tail=st.integers(0, 64),
)
@example(header={"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, length=2**64 - 1, tail=16)
def test_headers_that_lie_are_refused(folder, header, length, tail):
    path, text = folder / "header.safetensors", json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(tail))
    found = attempt(weights.read, path)
    for tensor in found[0].values() if found else ():
        assert tensor.nbytes <= tail
    refused(Tokens.load, path, says=["header.safetensors"])


def test_a_nested_header_of_a_million_brackets_is_refused(tmp_path):
    for text in (b"[" * 10**6, b'{"a":' * 10**6, b" " * 10**6):
        (tmp_path / "deep.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
        refused(weights.read, tmp_path / "deep.safetensors", says=["deep.safetensors"])


@fuzz(about=JSON | st.fixed_dictionaries({"system": st.just("aurora"), "config": JSON}) | st.builds(
    lambda field, value: {"system": "aurora", "config": {field: value}},
    st.sampled_from(["name", "weights", "hidden_dim", "codebook_size", "block", "stream", "image_size", "x"]),
    JSON | st.sampled_from([0, -1, 2**40, 2**63, "4", [4], None]),
))  # fmt: skip
@example(about={"system": "aurora", "config": {"name": "x"}})
@example(about={"system": "aurora", "config": {"codebook_size": 2**62}})
def test_a_description_that_does_not_fit_is_refused(folder, made, about):
    path, text = folder / "about.safetensors", json.dumps(about)
    path.write_bytes(serialize(dict(made.state_dict()), {"zoo": text}))
    refused(zoo.load_tokenizer, "aurora-tiny", path, says=["a"])


def test_descriptions_that_are_no_json_are_refused(folder, made):
    for text in ("", "{", "[" * 10**5, "\x00", '{"system": "aurora"}', '{"system": "seed", "config": {}}'):
        (folder / "about.safetensors").write_bytes(serialize(dict(made.state_dict()), {"zoo": text}))
        refused(zoo.load_tokenizer, "aurora-tiny", folder / "about.safetensors", says=["about.safetensors"])


@fuzz(data=st.data(), field=st.sampled_from(sorted(vars(registry.preset("aurora-tiny").config))))
def test_sizes_of_any_kind_are_taken_or_refused(data, field):
    attempt(zoo.create_tokenizer, "aurora-tiny", **{field: data.draw(JSON | st.sampled_from([0, -1, 1, 3, 8, 2**62]))})


class Runs:
    """A pickle that runs code where it is read."""

    def __init__(self, marker, how):
        self.marker, self.how = str(marker), how

    def __reduce__(self):
        code = f"open({self.marker!r}, 'w').close()"
        return {
            "eval": (eval, (code,)),
            "exec": (exec, (code,)),
            "system": (os.system, (f"touch {self.marker}",)),
            "open": (open, (self.marker, "w")),
            "import": (__import__, ("antigravity",)),
            "getattr": (getattr, ("text", "upper")),
            "load": (torch.load, (self.marker,)),
            "hub": (torch.hub.load, (self.marker, "x")),
        }[self.how]


@fuzz(
    how=st.sampled_from(["eval", "exec", "system", "open", "import", "getattr", "load", "hub"]),
    where=st.sampled_from(["alone", "beside", "key", "list", "deep", "weight"]),
    form=st.sampled_from(["torch", "old", "pickle", "protocol 5"]),
    suffix=st.sampled_from([".pt", ".pth", ".bin", ".ckpt", ".safetensors"]),
)
def test_nothing_in_a_pickle_is_run(folder, how, where, form, suffix):
    marker, path = folder / "was-run", folder / f"evil{suffix}"
    evil, tensor = Runs(marker, how), torch.zeros(2)
    content = {
        "alone": evil,
        "beside": {"a": tensor, "b": evil},
        "key": {"state_dict": {"a": tensor}, "hyper_parameters": {"x": evil}},
        "list": [tensor, evil],
        "deep": {"model": {"model": {"model": [evil]}}, "a": tensor},
        "weight": {"a": evil},
    }[where]
    if form in ("torch", "old"):
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    else:
        path.write_bytes(pickle.dumps(content, protocol=5 if form == "protocol 5" else 2))
    refused(weights.read, path, says=[path.name])
    refused(zoo.load_tokenizer, "aurora-tiny", path, says=[path.name])
    assert not marker.exists()


@fuzz(
    code=st.binary(max_size=60),
    head=st.sampled_from([b"", b"\x80\x02", b"\x80\x02}q\x00", b"PK\x03\x04", b"\x80\x02c"]),
)
@example(code=b"." * 3, head=b"\x80\x02")
def test_pickles_of_any_bytes_are_refused(folder, code, head):
    for name in ("bytes.pt", "bytes.safetensors"):
        (folder / name).write_bytes(head + code)
        refused(weights.read, folder / name, says=[name])


def archive(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(f"archive/{name}", content)


def test_a_file_that_unpacks_to_more_than_itself_is_refused(tmp_path):
    torch.save({"a": torch.zeros(10)}, tmp_path / "small.pt")
    with zipfile.ZipFile(tmp_path / "small.pt") as file:
        members = {name.split("/", 1)[1]: file.read(name) for name in file.namelist()}
    archive(tmp_path / "bomb.pt", members | {"data/0": bytes(2**26)}, zipfile.ZIP_DEFLATED)
    assert (tmp_path / "bomb.pt").stat().st_size < 2**20
    refused(weights.read, tmp_path / "bomb.pt", says=["compressed"])


def test_views_that_are_larger_than_their_file_are_refused(tmp_path):
    for shape in ((2**40,), (2**20, 2**20, 2**20)):
        torch.save({"a": torch.zeros(1).expand(shape)}, tmp_path / "view.pt")
        refused(weights.read, tmp_path / "view.pt", says=["view.pt", "dense"])
    for tensor in (torch.eye(2).to_sparse(), torch.empty(3, device="meta")):
        torch.save({"a": tensor}, tmp_path / "view.pt")
        refused(weights.read, tmp_path / "view.pt", says=["view.pt"])


def test_a_file_that_holds_itself_or_is_very_deep_is_refused(tmp_path):
    circle = {}
    circle["model"] = circle
    torch.save(circle, tmp_path / "circle.pt")
    refused(weights.read, tmp_path / "circle.pt", says=["circle.pt"])
    deep = b"\x80\x02" + b"}" + b"X\x05\x00\x00\x00model}" * 10**5 + b"s" * 10**5 + b"."
    with zipfile.ZipFile(tmp_path / "deep.pt", "w") as file:
        file.writestr("deep/data.pkl", deep)
        file.writestr("deep/version", "3")
        file.writestr("deep/byteorder", "little")
    refused(weights.read, tmp_path / "deep.pt", says=["deep.pt"])
    torch.save({1: torch.zeros(2), None: torch.zeros(2), ("a",): torch.zeros(2)}, tmp_path / "keys.pt")
    refused(weights.read, tmp_path / "keys.pt", says=["no tensors by name"])


PLACES = ["", ".", "~", "~nobody/x.pt", "no/such.pt", "a\0b.pt", "x" * 5000, "/dev/null", "folder.pt", "pipe.pt"]


@fuzz(
    place=st.sampled_from([*PLACES, "circle.pt", "empty.pt", "dangling.pt", 3, None, b"x", ("a",)])
    | st.text(max_size=9)
)
def test_what_is_no_file_is_refused(folder, place):
    for make in (
        lambda: (folder / "folder.pt").mkdir(),
        lambda: os.mkfifo(folder / "pipe.pt"),
        lambda: (folder / "circle.pt").symlink_to(folder / "circle.pt"),
        lambda: (folder / "dangling.pt").symlink_to(folder / "nothing"),
        lambda: (folder / "empty.pt").touch(),
    ):
        try:
            make()
        except FileExistsError:
            break
    if isinstance(place, str) and place.endswith(".pt") and "/" not in place and len(place) < 99:
        place = f"{folder}/{place}"
    refused(weights.read, place)
    refused(Tokens.load, place)
    if place is not None:
        refused(zoo.load_tokenizer, "aurora-tiny", place)


HUB = [
    "hf://",
    "hf://\n",
    "hf:/a/b/c",
    "hf://a/b",
    "hf://a/b@/c",
    "hf://a@b@c/d/e",
    "hf://../../etc/x",
    "hf://a/b/../../c",
]


@fuzz(location=st.sampled_from(HUB) | st.text(max_size=30).map("hf://{}".format))
def test_hub_locations_of_any_form_are_refused_without_a_network(location):
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        refused(zoo.load_tokenizer, "aurora-tiny", location)

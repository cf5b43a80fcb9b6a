import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from zoo import Weights, ZooError, hub, weights


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("touch executed",)


def module():
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))


@pytest.mark.parametrize("nest", [(), ("state_dict",), ("model",), ("weights",), ("model", "state_dict")])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "tokenizer."])
def test_nested_layouts_and_prefixes_are_unwrapped(tmp_path, nest, prefix):
    state = module().state_dict()
    content = {prefix + name: tensor for name, tensor in state.items()}
    for key in reversed(nest):
        content = {key: content, "epoch": 3}
    torch.save(content, tmp_path / "file.pt")
    found, _ = weights.read(tmp_path / "file.pt")
    assert found.keys() == state.keys()
    weights.load(module(), found)


def test_an_average_of_weights_goes_before_the_weights(tmp_path):
    torch.save({"model": {"a": torch.zeros(1)}, "ema": {"a": torch.ones(1)}}, tmp_path / "file.pth")
    assert weights.read(tmp_path / "file.pth")[0]["a"].item() == 1


def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": torch.zeros(1)}, "extra": Evil()}, "evil.pt")
    (tmp_path / "evil.bin").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pt", "evil.bin"):
        with pytest.raises(ZooError, match="execute code"):
            weights.read(tmp_path / name)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_truncated_or_empty_file_is_named(tmp_path, suffix):
    path = tmp_path / f"file{suffix}"
    state = {"a": torch.zeros(1000)}
    torch.save(state, path) if suffix == ".pt" else save_file(state, path)
    whole = path.read_bytes()
    for size in (len(whole) // 2, 0):
        path.write_bytes(whole[:size])
        with pytest.raises(ZooError, match=path.name):
            weights.read(path)


def test_a_file_without_tensors_is_refused(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "file.pt")
    with pytest.raises(ZooError, match="no tensors by name"):
        weights.read(tmp_path / "file.pt")


def test_what_does_not_fit_is_listed_and_nothing_is_loaded():
    target = module()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    state = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    state["0.weight"] = torch.zeros(5, 5)
    del state["1.bias"]
    state |= {f"extra.{i:02d}": torch.zeros(1) for i in range(12)}
    with pytest.raises(ZooError) as caught:
        weights.load(target, state)
    message = str(caught.value)
    assert "1 missing (1.bias)" in message
    assert "12 unexpected (extra.00, " in message
    assert "and 2 more" in message
    assert "0.weight (5, 5) instead of (3, 2)" in message
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_names_are_renamed_by_their_longest_prefix():
    state = dict.fromkeys(("a.b.weight", "a.c.weight", "ab.weight"), torch.zeros(1))
    renamed = weights.rename(state, {"a": "x", "a.b": "y"})
    assert set(renamed) == {"y.weight", "x.c.weight", "ab.weight"}


def test_a_registered_hash_is_checked(tmp_path):
    weights.save(tmp_path / "file.safetensors", {"a": torch.zeros(1)})
    location = str(tmp_path / "file.safetensors")
    with pytest.raises(ZooError, match="SHA-256"):
        weights.locate(Weights(location, sha256="0" * 64))
    with pytest.raises(ZooError, match="does not exist"):
        weights.read(weights.locate(Weights("nowhere.safetensors", sha256="0" * 64)))
    import hashlib

    right = hashlib.sha256((tmp_path / "file.safetensors").read_bytes()).hexdigest()
    assert weights.locate(Weights(location, sha256=right)) == tmp_path / "file.safetensors"


def test_a_hub_file_comes_through_the_hub_library(tmp_path, monkeypatch):
    import huggingface_hub

    weights.save(tmp_path / "model.safetensors", {"a": torch.ones(1)})
    asked = []

    def download(repository, file, **settings):
        asked.append((repository, file, settings))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert weights.locate("hf://owner/name/model.safetensors") == tmp_path / "model.safetensors"
    assert weights.locate("hf://owner/name@c0ffee/model.safetensors") == tmp_path / "model.safetensors"
    assert asked == [
        ("owner/name", "model.safetensors", {}),
        ("owner/name", "model.safetensors", {"revision": "c0ffee"}),
    ]
    sha256 = weights.sha256_of(tmp_path / "model.safetensors")
    assert weights.locate(Weights("hf://owner/name/model.safetensors", sha256)) == tmp_path / "model.safetensors"
    with pytest.raises(ZooError, match=r"is not the file registered .*: SHA-256"):
        weights.locate(Weights("hf://owner/name@c0ffee/model.safetensors", "0" * 64))


def test_parts_from_the_hub_can_be_of_a_revision(tmp_path, monkeypatch):
    asked = []

    class Kind:
        @classmethod
        def from_pretrained(cls, name, **settings):
            asked.append((name, settings))

    monkeypatch.chdir(tmp_path)
    (tmp_path / "a@folder").mkdir()
    for source in ("owner/name", "owner/name@v1", "a@folder", tmp_path / "a@folder"):
        hub.pretrained(Kind, source, dtype=1)
    assert asked == [
        ("owner/name", {"dtype": 1}),
        ("owner/name", {"dtype": 1, "revision": "v1"}),
        ("a@folder", {"dtype": 1}),
        (str(tmp_path / "a@folder"), {"dtype": 1}),
    ]


def test_a_file_in_the_cache_of_torch_hub_is_the_one_that_its_name_says(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/net-ba7816bf.pth").write_bytes(b"abc")
    url = "https://example.org/net-ba7816bf.pth"
    assert weights.published_file(url) == tmp_path / "checkpoints/net-ba7816bf.pth"
    (tmp_path / "checkpoints/net-ba7816bf.pth").write_bytes(b"abd")
    with pytest.raises(ZooError, match=r"is not the file of https.*instead of ba7816bf"):
        weights.published_file(url)


def test_a_failed_download_says_what_to_do(monkeypatch):
    import huggingface_hub

    def download(repository, file, **settings):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(ZooError, match=r"no network.*weights='path/to/model.safetensors'"):
        weights.locate("hf://owner/name/model.safetensors")


def test_of_a_training_checkpoint_the_tokenizer_alone_is_taken(tmp_path):
    state = {f"tokenizer.{name}": tensor for name, tensor in module().state_dict().items()}
    beside = {"discriminators.0.weight": torch.zeros(2), "quality.probabilities": torch.zeros(3)}
    torch.save({"pytorch-lightning_version": "2.6", "state_dict": state | beside}, tmp_path / "last.ckpt")
    weights.load(module(), weights.read(tmp_path / "last.ckpt")[0])

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import zoo
from zoo import Preset, ZooError
from zoo.registry import KINDS, Registry, preset, presets
from zoo.tokenizer import config_fields, make_config


def test_import_is_light():
    heavy = "lightning", "diffusers", "transformers", "timm", "hydra", "torchvision", "matplotlib", "PIL"
    code = f"import sys, zoo; zoo.load_tokenizer('aurora-tiny'); print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_names_are_listed_by_pattern_and_by_having_weights():
    assert {"aurora-depth", "aurora-tiny"} <= set(zoo.list_tokenizers())
    assert zoo.list_tokenizers("aurora-t*") == ["aurora-tiny"]
    assert "aurora-depth" not in zoo.list_tokenizers(pretrained=True)
    assert "aurora-depth" in zoo.list_tokenizers(pretrained=False)


def test_every_kind_has_its_own_names():
    """And its three functions, which are those of the package."""
    assert [kind.kind for kind in KINDS] == ["tokenizer", "generator", "encoder", "decoder"]
    names = [name for kind in KINDS for name in kind.presets()]
    assert len(names) == len(set(names))
    for kind in KINDS:
        assert getattr(zoo, f"list_{kind.kind}s")() == sorted(kind.presets())
        assert getattr(zoo, f"create_{kind.kind}") == kind.create
        assert getattr(zoo, f"load_{kind.kind}") == kind.load
        with pytest.raises(ZooError, match=f"no {kind.kind} is called 'nothing'"):
            kind.create("nothing")


def test_every_shipped_name_loads_and_reconstructs():
    for name in zoo.list_tokenizers(pretrained=True):
        if preset(name).weights.location.startswith("hf://"):  # not here without a network
            continue
        tokenizer = zoo.load_tokenizer(name)
        info = tokenizer.info
        assert not tokenizer.training
        images = torch.rand(2, info.channels, info.image_size, info.image_size)
        assert tokenizer.reconstruct(images).shape == images.shape
        tokens = tokenizer.encode(images)
        if info.kind == "discrete":
            assert tokenizer.embed(tokens).shape == (*tokens.mask.shape, info.embedding_dim)
        else:
            with pytest.raises(ZooError, match="continuous tokens and no codebook embeddings"):
                tokenizer.embed(tokens)


def test_a_saved_tokenizer_comes_back_with_its_own_sizes(tmp_path):
    tokenizer = zoo.create_tokenizer("aurora-tiny", codebook_size=32, codebook_init="published").eval()
    zoo.save_tokenizer(tokenizer, tmp_path / "mine.safetensors")
    loaded = zoo.load_tokenizer("aurora-tiny", weights=tmp_path / "mine.safetensors")
    maps = torch.rand(2, 1, 64, 64)
    assert loaded.config == tokenizer.config
    assert torch.equal(loaded.encode(maps).ids["depth"], tokenizer.encode(maps).ids["depth"])
    half = zoo.load_tokenizer("aurora-tiny", weights=tmp_path / "mine.safetensors", dtype=torch.bfloat16)
    assert half.reconstruct(maps).dtype == torch.bfloat16


def test_the_authors_file_loads_under_their_names(tmp_path):
    from zoo.tokenizers.aurora.published import to_published

    tokenizer = zoo.create_tokenizer("aurora-depth").eval()
    theirs = {f"module.{k}": v for k, v in to_published(tokenizer.state_dict(), tokenizer.config).items()}
    torch.save({"weights": theirs}, tmp_path / "vae-final.pt")
    loaded = zoo.load_tokenizer("aurora-depth", weights=tmp_path / "vae-final.pt")
    for name, tensor in tokenizer.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name

    for_inference = {k: v for k, v in theirs.items() if "_ema" not in k}
    torch.save({"weights": for_inference}, tmp_path / "inference.pt")
    loaded = zoo.load_tokenizer("aurora-depth", weights=tmp_path / "inference.pt")
    assert torch.equal(loaded.quantizer.embed_sum, loaded.quantizer.codebook)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: zoo.load_tokenizer("aurora-tinny"), "did you mean aurora-tiny"),
        (lambda: zoo.create_tokenizer("nothing-like-it"), "there are: "),
        (lambda: zoo.create_tokenizer("aurora-tiny", codebok_size=3), "did you mean codebook_size"),
        (lambda: zoo.create_tokenizer("aurora-tiny", codebook_size="big"), "of type int, got 'big'"),
        (lambda: zoo.create_tokenizer("aurora-tiny", codebook_size=0), "at least 1"),
        (lambda: zoo.create_tokenizer("aurora-tiny", downsample=24), "power of two"),
        (lambda: zoo.create_tokenizer("aurora-tiny", block="v3"), "one of"),
        (lambda: zoo.load_tokenizer("aurora-depth"), "Drive folder.*zoo.load_tokenizer"),
        (lambda: zoo.load_tokenizer("aurora-tiny", weights="/nowhere/x.pt"), "does not exist"),
        (lambda: zoo.load_tokenizer("aurora-tiny", weights="hf://owner"), "hf://owner/name/file"),
    ],
)
def test_wrong_names_fields_and_places_are_refused_in_one_sentence(call, complaint):
    with pytest.raises(ZooError, match=complaint):
        call()


def test_a_name_can_be_added_from_outside_once():
    added = replace(preset("aurora-tiny"), description="mine", weights=None)
    zoo.register_tokenizer("mine-test", added)
    try:
        assert zoo.create_tokenizer("mine-test").info.name == "mine-test"
        with pytest.raises(ZooError, match="taken"):
            zoo.register_tokenizer("mine-test", added)
        with pytest.raises(ZooError, match="no weights are published"):
            zoo.load_tokenizer("mine-test")
    finally:
        from zoo import registry

        del registry.tokenizers._registered["mine-test"]
    assert "mine-test" not in presets()


def test_a_configuration_within_another_is_changed_field_by_field():
    tokenizer = zoo.create_tokenizer("karl-tiny", base={"channels": 8, "norm_groups": 4})
    assert (tokenizer.config.base.channels, tokenizer.config.base.embed_dim) == (8, 32)
    fields = config_fields(tokenizer.config)
    assert fields["base"]["class"] == "VQGANConfig"
    assert make_config(preset("karl-tiny").config, fields) == tokenizer.config
    with pytest.raises(zoo.ZooError, match=r"KarlConfig.base is a VQGANConfig here, got a KLConfig"):
        zoo.create_tokenizer("karl-tiny", base={"class": "KLConfig"})
    with pytest.raises(zoo.ZooError, match="VQGANConfig has no field 'chanels'; did you mean channels"):
        zoo.create_tokenizer("karl-tiny", base={"chanels": 8})


def test_parts_can_begin_anew(tmp_path):
    torch.manual_seed(0)
    trained = zoo.create_tokenizer("aurora-tiny")
    zoo.save_tokenizer(trained, tmp_path / "mine.safetensors")
    part = next(name for name, _ in trained.named_children())
    loaded = zoo.load_tokenizer("aurora-tiny", tmp_path / "mine.safetensors", fresh=[part])
    same = {name: torch.equal(one, trained.state_dict()[name]) for name, one in loaded.state_dict().items()}
    assert not all(equal for name, equal in same.items() if name.startswith(f"{part}."))
    assert all(equal for name, equal in same.items() if not name.startswith(f"{part}."))
    with pytest.raises(ZooError, match="aurora-tiny has no part 'encode'"):
        zoo.load_tokenizer("aurora-tiny", tmp_path / "mine.safetensors", fresh=["encode"])


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({}, "the package 'another' adds tokenizers .* cannot be imported .* uninstall another-zoo"),
        (
            {"__init__.py": "", "tokenizer.py": "from zoo.tokenizers.kl.tokenizer import PRESETS"},
            "the package 'another' adds 'kl-f16', a name that is taken; rename it",
        ),
    ],
)
def test_a_package_that_cannot_add_its_names_is_named(tmp_path, monkeypatch, files, complaint):
    """What installing it leaves on the path; examples/fsq has a test of one that can."""
    about = {"METADATA": "Name: another-zoo\nVersion: 1\n", "entry_points.txt": "[zoo.tokenizers]\nx = another\n"}
    for folder, contents in {"another": files, "another_zoo-1.dist-info": about}.items():
        (tmp_path / folder).mkdir()
        for name, text in contents.items():
            (tmp_path / folder / name).write_text(text)
    if not files:
        (tmp_path / "another").rmdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ZooError, match=complaint):
        Registry("tokenizer").presets()
    for module in [name for name in sys.modules if name.split(".")[0] == "another"]:
        monkeypatch.delitem(sys.modules, module)


def test_a_file_of_other_names_for_a_system_without_published_ones_is_refused_by_name(tmp_path):
    class Mine(torch.nn.Module):
        """Lives in this file, which is in no package."""

        def __init__(self, config):
            super().__init__()
            self.config, self.info = config, preset("kl-tiny").tokenizer(config).info
            self.layer = torch.nn.Linear(2, 2)

    registry = Registry("tokenizer")
    registry.register("mine-test", Preset(Mine, preset("kl-tiny").config, "mine"))
    torch.save({"other.weight": torch.zeros(2, 2)}, tmp_path / "other.pt")
    with pytest.raises(ZooError, match="layer"):
        registry.load("mine-test", tmp_path / "other.pt")
    made = registry.create("mine-test")
    zoo.save_tokenizer(made, tmp_path / "mine.safetensors")
    assert torch.equal(registry.load("mine-test", tmp_path / "mine.safetensors").layer.weight, made.layer.weight)

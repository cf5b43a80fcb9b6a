"""Models of the zoo in the convention of huggingface_hub: folders, and a hub that is a folder."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard

import zoo
from zoo import ZooError
from zoo.hub import HubModel
from zoo.registry import KINDS
from zoo.tokenizer import config_fields
from zoo.weights import sha256_of

COMMIT = "c0ffee" + "0" * 34


@pytest.fixture
def tokenizer():
    """Small, with sizes of its own."""
    made = zoo.create_tokenizer("aurora-tiny", codebook_size=16, hidden_dim=4).eval()
    made.about = {"recipe": "none", "metrics": {"PSNR": "30.1 dB"}}
    return made


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """In place of the hub: what is pushed becomes a commit in a cache of huggingface_hub, which is all that is read."""
    cache = tmp_path / "cache"

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, private, exist_ok):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id, folder_path, revision, commit_message, **settings):
            folder = cache / f"models--{repo_id.replace('/', '--')}"
            shutil.copytree(folder_path, folder / "snapshots" / COMMIT)
            (folder / "refs").mkdir()
            (folder / "refs" / (revision or "main")).write_text(COMMIT)
            return f"{repo_id}: {commit_message}"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    return {"cache_dir": cache, "local_files_only": True}


def assert_same(one, other):
    assert type(one) is type(other)
    assert one.config == other.config
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize("name", ["mingtok-tiny", "xar-tiny", "siglip-tiny", "seed-tiny-decoder"])
def test_every_kind_is_saved_and_read(tmp_path, name):
    kind = next(kind for kind in KINDS if name in kind.presets())
    made = kind.load(name)
    made.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    for base in (HubModel, type(made)):
        read = base.from_pretrained(tmp_path)
        assert_same(made, read)
        assert not read.training
    assert read.about["card"] == made.about["card"]
    if kind.kind != "tokenizer":
        with pytest.raises(ZooError, match=f"is a {kind.kind}, {name}, and no Tokenizer"):
            zoo.Tokenizer.from_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert {"tokenizer-zoo", kind.kind, made.info.system} <= set(card.data.tags)
    assert f"{type(made).__name__}.from_pretrained(" in card.text
    assert made.about["card"].splitlines()[2] in card.text
    assert "![" not in card.text


def test_names_of_the_files_fields_are_nobody_elses():
    for kind in KINDS:
        for preset in kind.presets().values():
            assert not {"name", "kind", "system"} & config_fields(preset.config).keys()


def test_a_tokenizer_is_pushed_and_read_by_revision(tokenizer, hub):
    assert tokenizer.push_to_hub("owner/mine", commit_message="first", branch="v1") == "owner/mine: first"
    for source, settings in (("owner/mine", {"revision": "v1"}), ("owner/mine@v1", {}), (f"owner/mine@{COMMIT}", {})):
        read = zoo.Tokenizer.from_pretrained(source, **settings, **hub)
        assert_same(tokenizer, read)
        assert read.about == tokenizer.about
    assert zoo.Tokenizer.from_pretrained("owner/mine@v1", dtype=torch.bfloat16, **hub).dtype == torch.bfloat16
    with pytest.raises(ZooError, match=r"cannot download config.json of 'owner/mine' .*give 'owner/name'"):
        zoo.Tokenizer.from_pretrained("owner/mine", **hub)  # main is not there
    card = (hub["cache_dir"] / "models--owner--mine/snapshots" / COMMIT / "README.md").read_text()
    for text in (
        "from_pretrained('owner/mine')",
        "library_name: tokenizer-zoo",
        "| PSNR | 30.1 dB |",
        "| recipe | none |",
    ):
        assert text in card


def test_a_licence_that_the_hub_has_no_name_for_is_said_in_words(tmp_path):
    made = zoo.create_tokenizer("aurora-depth", hidden_dim=4)
    made.save_pretrained(tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.license_name) == ("other", made.info.licence)
    assert data.pipeline_tag == "image-feature-extraction"


def test_a_pinned_file_is_checked(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    right = sha256_of(tmp_path / "model.safetensors")
    assert_same(tokenizer, zoo.Tokenizer.from_pretrained(tmp_path, sha256=right))
    with pytest.raises(ZooError, match="SHA-256"):
        zoo.Tokenizer.from_pretrained(tmp_path, sha256="0" * 64)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda path: (path / "config.json").unlink(), "has no config.json"),
        (lambda path: (path / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda path: (path / "config.json").write_text("{"), "is not what save_pretrained of the zoo wrote"),
        (lambda path: (path / "config.json").write_text('{"model_type": "bert"}'), "is not what save_pretrained"),
        (lambda path: edit(path, name="aurora-tinny"), "did you mean aurora-tiny"),
        (lambda path: edit(path, codebok_size=3), "did you mean codebook_size"),
        (lambda path: edit(path, codebook_size=32), "does not fit"),
        (lambda path: edit(path, weights="other.pt"), "has no field 'weights'"),
    ],
)
def test_what_is_no_folder_of_the_zoo_is_refused(tokenizer, tmp_path, change, complaint):
    tokenizer.save_pretrained(tmp_path)
    change(tmp_path)
    with pytest.raises(ZooError, match=complaint):
        zoo.Tokenizer.from_pretrained(tmp_path)


def edit(path, **fields):
    content = json.loads((path / "config.json").read_text()) | fields
    (path / "config.json").write_text(json.dumps(content))


def test_a_hub_that_refuses_is_reported(tokenizer, monkeypatch):
    def refuse(self, **settings):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi.create_repo", refuse)
    with pytest.raises(ZooError, match=r"cannot write owner/mine to the hub \(OSError: no network\); log in"):
        tokenizer.push_to_hub("owner/mine")


def test_names_are_a_list_that_is_shown_as_a_table():
    names = zoo.list_tokenizers("aurora-*")
    assert names == ["aurora-depth", "aurora-tiny"]
    shown = str(names)
    assert shown == repr(names)
    assert "small depth tokenizer" in shown
    assert all(name in shown for name in ("system", "weights", *names))
    assert str(zoo.list_tokenizers("nothing*")).count("aurora") == 0

"""Shards of `zoo pretokenize` come back as the tokens of the images that they were made of."""

import json
import shutil

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Subset
from torch.utils.data.distributed import DistributedSampler

import zoo
from zoo import Tokens, ZooError
from zoo.commands.pretokenize import main, stored
from zoo.commands.train import main as train
from zoo.data import Loader, TokenDataset, folder
from zoo.data.images import as_numbers

COUNT = 10


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Images in two folders, one of whose names is too long for the header of a tar file, and beyond ASCII."""
    path, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(COUNT):
        file = path / ("ü" * 120 if i % 2 else "a") / f"{i}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file)
    return path


@pytest.fixture(scope="module")
def pretokenize(pictures, tmp_path_factory):
    """Writes the shards of a tokenizer, once for each set of overrides; returns their folder."""
    made = {}

    def write(name, *overrides):
        if (name, overrides) not in made:
            output = tmp_path_factory.mktemp(name)
            data = ("data=folder", f"data.path={pictures}", "data.num_workers=0", "data.fields=[image,class]")
            where = ("batch_size=4", "num_shards=3", "device=cpu", f"output_dir={output}")
            assert main([f"tokenizer={name}", *data, *where, *overrides]) == 0
            made[name, overrides] = output
        return made[name, overrides]

    return write


@pytest.fixture
def karl(pretokenize):
    return pretokenize("karl-tiny")


@pytest.fixture
def copy(karl, tmp_path):
    """Of the shards, to be broken."""
    return shutil.copytree(karl, tmp_path / "copy")


def loader(dataset, **options):
    return DataLoader(dataset, batch_size=4, collate_fn=TokenDataset.collate, **options)


def edit(folder, change):
    """Change the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def encoded(name, pictures):
    """Tokens and class of each image by its key in the shards."""
    tokenizer, found = zoo.load_tokenizer(name), {}
    for batch in Loader(folder(pictures), batch_size=5, fields=["image", "class"]):
        tokens = tokenizer.encode(batch["image"])
        for i, key in enumerate(batch["key"]):
            found[key.replace(".", "_")] = tokens[i], batch["class"][i]
    return found


@pytest.mark.parametrize(
    ("name", "overrides", "tolerance"),
    [
        ("karl-tiny", (), 0),
        ("dualtoken-tiny", (), 0),
        ("kl-tiny", ("array_dtype=float32",), 1e-4),
        ("mingtok-tiny", ("array_dtype=bfloat16",), 2**-7),
    ],
)
def test_tokens_are_those_of_the_images(pretokenize, pictures, name, overrides, tolerance):
    dataset, expected = TokenDataset(pretokenize(name, *overrides), ["class"], tokenizer=name), encoded(name, pictures)
    assert len(dataset) == COUNT == len(expected)
    for batch in loader(dataset):
        for i, key in enumerate(batch["key"]):
            (tokens, label), found = expected.pop(key), batch["tokens"][i]
            assert batch["class"][i] == label
            assert found.grid == tokens.grid
            assert found.ids.keys() == tokens.ids.keys()
            assert torch.equal(found.mask, tokens.mask)
            assert all(torch.equal(found.ids[stream], ids) for stream, ids in tokens.ids.items())
            for stream, latents in tokens.latents.items():
                torch.testing.assert_close(found.latents[stream], latents, rtol=tolerance, atol=1e-4)
    assert not expected


def test_the_manifest_and_the_report_say_how_fast_and_how_small(pretokenize, pictures, capsys):
    manifest = json.loads((pretokenize("karl-tiny", "seed=1") / "manifest.json").read_text())
    files = [path.stat().st_size for path in pictures.rglob("*.png")]
    shards = sum(shard["bytes"] for shard in manifest["shards"].values())
    sizes = manifest["bytes_per_image"]
    assert sizes["source"] == pytest.approx(np.mean(files))
    assert sizes["shards"] == pytest.approx(shards / COUNT)
    assert sizes["image.ids.npy"] == 128 + 64 * 2  # a header, and 64 ids below 1024
    assert manifest["images_per_second"] > 0
    assert "images/s" in capsys.readouterr().out


def test_bfloat16_is_rounded_as_torch_does_and_what_does_not_fit_is_refused():
    latents = torch.randn(50) * 10 ** torch.arange(-25, 25).float()
    found = torch.from_numpy(as_numbers(stored(latents, torch.bfloat16)))
    assert torch.equal(found, latents.bfloat16().float())
    with pytest.raises(ZooError, match=r"not finite as torch\.float16; take array_dtype=bfloat16"):
        stored(latents, torch.float16)


def test_any_number_of_workers_and_ranks_gives_each_sample_once(karl):
    dataset = TokenDataset(karl, ["class"])
    keys = [key for batch in loader(dataset) for key in batch["key"]]
    assert len(set(keys)) == COUNT
    for workers, shuffle in ((0, True), (2, False), (2, True)):
        batches = list(loader(dataset, num_workers=workers, shuffle=shuffle))
        found = [key for batch in batches for key in batch["key"]]
        assert sorted(found) == sorted(keys)
        assert (found == keys) == (not shuffle)
        for batch in batches:
            for i, key in enumerate(batch["key"]):
                assert torch.equal(batch["tokens"].ids["image"][i], dataset[keys.index(key)]["tokens"].ids["image"][0])
    for ranks in (1, 3, 4):
        parts = [Subset(dataset, range(rank, COUNT, ranks)) for rank in range(ranks)]
        assert sorted(key for part in parts for batch in loader(part) for key in batch["key"]) == sorted(keys)
        samplers = [DistributedSampler(dataset, ranks, rank, drop_last=True) for rank in range(ranks)]
        parts = [[k for batch in loader(dataset, sampler=one) for k in batch["key"]] for one in samplers]
        assert {len(part) for part in parts} == {COUNT // ranks}
        assert len({key for part in parts for key in part}) == COUNT // ranks * ranks
        evaluated = [Loader(dataset, batch_size=3, fields=["tokens"], rank=r, world_size=ranks) for r in range(ranks)]
        assert [key for one in evaluated for batch in one for key in batch["key"]] == keys


def test_data_sets_can_be_joined_and_the_zoos_loader_reads_the_same(karl):
    dataset = TokenDataset(karl, ["class"])
    whole = [sample for batch in loader(ConcatDataset([dataset, dataset])) for sample in batch["key"]]
    assert whole == 2 * [dataset[i]["key"] for i in range(COUNT)]
    for workers in (0, 2):
        options = {"fields": ["tokens", "class"], "batch_size": 4, "num_workers": workers}
        for batch, other in zip(Loader(dataset, **options), loader(dataset), strict=True):
            assert batch["key"] == other["key"]
            assert batch["class"] == other["class"]
            assert torch.equal(batch["tokens"].ids["image"], other["tokens"].ids["image"])
            assert torch.equal(batch["tokens"].mask, other["tokens"].mask)


def test_mirrored_views_are_taken_at_random_and_only_when_asked_for(pretokenize, pictures):
    both = pretokenize("kl-tiny", "array_dtype=float32", "flip=true")
    plain = TokenDataset(pretokenize("kl-tiny", "array_dtype=float32"), ["moments"])
    straight, flipped = TokenDataset(both, ["moments"]), TokenDataset(both, flip=True)
    for i in range(COUNT):
        torch.testing.assert_close(straight[i]["tokens"].latents, plain[i]["tokens"].latents)
        assert straight[i]["moments"].shape == (2, 16, 8, 8)
    torch.manual_seed(0)
    same = [
        torch.equal(flipped[i]["tokens"].latents["image"], straight[i]["tokens"].latents["image"]) for i in range(COUNT)
    ]
    assert 0 < sum(same) < COUNT
    ours = next(iter(Loader(flipped, batch_size=COUNT, fields=["tokens"], training=True, flip=True)))
    views = {}
    for i in range(COUNT):
        views[straight[i]["key"]] = straight[i]["tokens"].latents["image"][0]
    same = [torch.equal(ours["tokens"].latents["image"][i], views[key]) for i, key in enumerate(ours["key"])]
    assert 0 < sum(same) < COUNT


def test_lightning_moves_and_deals_out_the_tokens(karl):
    class Module(L.LightningModule):
        seen = ()

        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(zoo.load_tokenizer("karl-tiny").info.codebook_sizes["image"], 2)

        def training_step(self, batch, batch_idx):
            assert isinstance(batch["tokens"], Tokens)
            self.seen = [*self.seen, *batch["key"]]
            return self.embedding(batch["tokens"].ids["image"]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module, quiet = Module(), {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, log_every_n_steps=1, **quiet)
    trainer.fit(module, loader(TokenDataset(karl), shuffle=True, num_workers=1, persistent_workers=True))
    assert len(set(module.seen)) == len(module.seen) == COUNT


def test_zoo_train_reads_tokens(pretokenize, tmp_path, capsys):
    small = [
        *("generator.width=32", "generator.encoder_depth=1", "generator.decoder_depth=1", "generator.encoder_heads=2"),
        *("generator.decoder_heads=2", "generator.num_steps=2", "generator.num_classes=2", "generator.class_names=[]"),
    ]
    labels = ["module.labels._target_=zoo.data.labels.class_field", "data.fields=[tokens,class]"]
    data = ["data=tokens", f"data.path={pretokenize('kl-tiny')}", "data.num_workers=0", "data.batch_size=4"]
    run = ["trainer=tiny-debug", "trainer.max_steps=2", f"output_dir={tmp_path / 'run'}"]
    assert train(["experiment=xar-tiny", *small, *data, *labels, *run]) == 0, capsys.readouterr().err
    generator = zoo.load_generator("xar-tiny", weights=tmp_path / "run/generator.safetensors")
    assert generator.about == {"recipe": "zoo train, xar-tiny, 2 steps", "data": "tokens"}
    wrong = [one.replace("kl-tiny", "karl") for one in data]
    wrong[1] = f"data.path={pretokenize('karl-tiny')}"
    assert train(["experiment=xar-tiny", *small, *wrong, *labels, f"output_dir={tmp_path / 'no'}"]) == 2
    assert "holds tokens of karl-tiny, expected kl-tiny" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "settings", "complaint"),
    [
        (lambda path: (path / "manifest.json").unlink(), {}, "has no manifest.json"),
        (lambda path: (path / "manifest.json").write_text("{"), {}, "cannot be read"),
        (lambda path: edit(path, lambda m: m["protocol"].update(layout=1)), {}, "is of layout 1, and 2 is read"),
        (lambda path: (path / "00001.tar").unlink(), {}, "00001.tar is not there"),
        (lambda path: (path / "00001.tar").write_bytes(b""), {}, "has 0 bytes and"),
        (lambda path: None, {"tokenizer": "kl-tiny"}, "holds tokens of karl-tiny, expected kl-tiny"),
        (lambda path: None, {"tokenizer": "karl-tiny", "weights": __file__}, "made with other weights of karl-tiny"),
        (lambda path: None, {"flip": True}, "has no mirrored images; write it with"),
        (lambda path: flip_a_bit(path / "00001.tar"), {"verify": True}, "has SHA-256"),
        (
            lambda path: edit(path, lambda m: m["shards"]["00001.tar"].update(samples=7)),
            {},
            "00001.tar has not the 7 samples",
        ),
    ],
)
def test_what_is_not_as_the_manifest_says_is_refused(copy, change, settings, complaint):
    change(copy)
    with pytest.raises(ZooError, match=complaint):
        list(loader(TokenDataset(copy, **settings)))


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)


def test_tokens_of_shards_without_their_folder_are_refused(karl):
    with pytest.raises(ZooError, match=r"data=tokens data\.path=FOLDER"):
        list(Loader(str(karl / "00000.tar"), batch_size=2, fields=["tokens"]))
    with pytest.raises(IndexError):
        TokenDataset(karl)[COUNT]
    assert TokenDataset(karl)[-1]["key"] == TokenDataset(karl)[COUNT - 1]["key"]

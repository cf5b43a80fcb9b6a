from pathlib import Path

import lightning
import pytest
import torch
from data_helpers import keys, picture
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint

from zoo.data import ZooDataModule, photos
from zoo.errors import ZooError

CONF = Path(__file__).parents[2] / "conf" / "data"


class Recorder(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["key"])
        return self.weight * batch["image"].mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters())


def seen_in_training(paths, folder, workers, resume_from=None, callbacks=(), **length) -> list[list[str]]:
    module, data = Recorder(), ZooDataModule(paths, paths[:1], batch_size=3, image_size=8, num_workers=workers)
    trainer = lightning.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        enable_checkpointing=bool(callbacks),
        **length,
    )
    trainer.fit(module, data, ckpt_path=resume_from)
    return module.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "length", [{"max_epochs": 3}, {"max_steps": 11, "limit_train_batches": 4, "val_check_interval": 2}], ids=str
)
def test_a_resumed_training_sees_what_an_uninterrupted_one_sees(make_shards, tmp_path, workers, length):
    paths = make_shards(7, 8)  # five batches an epoch
    save = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    full = seen_in_training(paths, tmp_path, workers, callbacks=[save], **length)
    for step in (3, 5) if workers else range(1, len(full)):
        resumed = seen_in_training(paths, tmp_path, workers, resume_from=tmp_path / f"step={step}.ckpt", **length)
        assert resumed == full[step:]


def test_the_rank_is_that_of_the_trainer(make_shards):
    seen = []
    for rank in range(2):
        data = ZooDataModule(make_shards(8), batch_size=2)
        data.trainer = type("Trainer", (), {"global_rank": rank, "world_size": 2})
        seen += keys(data.train_dataloader())
    assert len(set(seen)) == 8


def test_evaluation_without_a_validation_part_is_over_the_training_part(make_shards):
    (one, two) = make_shards(3, 2)
    assert keys(ZooDataModule(one, two, batch_size=2).test_dataloader()) == ["shard1-0", "shard1-1"]
    data = ZooDataModule(one, batch_size=2)
    assert keys(data.test_dataloader()) == ["shard0-0", "shard0-1", "shard0-2"]
    assert data.val_dataloader() == []
    with pytest.raises(ZooError, match="nothing to train on"):
        ZooDataModule(val=photos(), batch_size=2).train_dataloader()
    with pytest.raises(ZooError, match="nothing to evaluate on"):
        ZooDataModule(batch_size=2).test_dataloader()


def configured(name: str, *overrides: str) -> ZooDataModule:
    with initialize_config_dir(str(CONF.parent), version_base=None):
        cfg = compose(
            overrides=[f"+data={name}", "+seed=3", "+tokenizer.image_size=8", "data.num_workers=0", *overrides]
        )
    return instantiate(cfg.data)


def test_the_configurations_give_data(make_shards, tmp_path):
    paths = make_shards(5, 6)
    data = configured(
        "shards", f"data.train='{tmp_path}/shard-{{0..1}}.tar'", "data.batch_size=2", "data.fields=[caption]"
    )
    assert len(data.train_dataloader()) == 5
    assert next(iter(data.train_dataloader()))["caption"][0].startswith("number")
    mix = f"data.train=[{{urls: '{paths[0]}', weight: 2}}, {{urls: '{paths[1]}', weight: 1}}]"
    assert len(configured("shards", mix, "data.batch_size=1").train_dataloader()) == 11

    (tmp_path / "images").mkdir()
    for i in range(3):
        (tmp_path / "images" / f"{i}.png").write_bytes(picture(i, size=9))
    data = configured("folder", f"data.path={tmp_path}/images", "data.batch_size=1", "data.flip=true")
    assert next(iter(data.train_dataloader()))["image"].shape == (1, 3, 8, 8)
    assert keys(data.test_dataloader()) == ["0.png", "1.png", "2.png"]
    depth = configured("folder", f"data.path={tmp_path}/images", "data.fields=[depth]", "data.batch_size=3")
    assert next(iter(depth.test_dataloader()))["depth"].shape == (3, 1, 8, 8)
    with pytest.raises(Exception, match="a folder holds images or depth maps"):
        configured("folder", f"data.path={tmp_path}/images", "data.fields=[image,depth]")

    assert next(iter(configured("photos").test_dataloader()))["image"].shape == (14, 3, 8, 8)
    assert next(iter(configured("photos", "data.fields=[depth]").test_dataloader()))["depth"].shape == (1, 1, 8, 8)

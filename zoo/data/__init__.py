"""Data: the embedded scenes, photographs, image folders and webdataset shards, as batches to train and evaluate on."""

from zoo.data.datamodule import ZooDataModule
from zoo.data.loader import Loader, joined, read_all
from zoo.data.sources import folder, photos, scenes, shards
from zoo.data.tokens import TokenDataset

__all__ = ["Loader", "TokenDataset", "ZooDataModule", "folder", "joined", "photos", "read_all", "scenes", "shards"]

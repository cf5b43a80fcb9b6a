"""The data of a run, for Lightning."""

from pathlib import Path

from lightning import LightningDataModule

from zoo.data import sources
from zoo.data.loader import Loader
from zoo.data.tokens import TokenDataset
from zoo.errors import ZooError


class ZooDataModule(LightningDataModule):
    """Training and validation loaders of the trainer's rank.

    train, val: sources, shard patterns, {urls, weight}, or lists of these; either may be None.
    options: of `zoo.data.Loader`.

    The position in the training data is saved in checkpoints; a resumed run goes on with the batch after it.
    """

    def __init__(self, train=None, val=None, *, batch_size: int, **options):
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = (
            True  # there may be fewer validation samples than ranks
        )
        self.train, self.val, self.options = train, val, {"batch_size": batch_size, **options}
        self._training: Loader | None = None
        self._state: dict | None = None

    @classmethod
    def from_folder(cls, path: str | Path, val_path: str | Path | None = None, *, fields=("image",), **options):
        """The files below a folder, as depth maps if the fields have "depth"; see `zoo.data.folder`. Validation and
        evaluation are over val_path; without it there is no validation, and evaluation is over path."""
        if len({"image", "depth"} & set(fields)) == 2:
            raise ZooError("a folder holds images or depth maps: have one of them among the fields, or use shards")
        modality = "depth" if "depth" in fields else "image"
        val = None if val_path is None else sources.folder(val_path, modality)
        return cls(sources.folder(path, modality), val, fields=fields, **options)

    @classmethod
    def from_photos(cls, *, fields=("image",), **options):
        """No training, and evaluation over `zoo.data.photos`."""
        return cls(None, sources.photos(fields), fields=fields, **options)

    @classmethod
    def from_tokens(
        cls,
        path: str | Path,
        val_path: str | Path | None = None,
        *,
        tokenizer: str | None = None,
        weights: str | Path | None = None,
        fields=("tokens",),
        **options,
    ):
        """Folders of `zoo pretokenize` to train and to validate on, of that tokenizer; see `zoo.data.TokenDataset`."""
        val = None if val_path is None else TokenDataset(val_path, tokenizer=tokenizer, weights=weights)
        return cls(TokenDataset(path, tokenizer=tokenizer, weights=weights), val, fields=fields, **options)

    def train_dataloader(self) -> Loader:
        if self.train is None:
            raise ZooError("there is nothing to train on: this data has no training part, give data.train")
        state, self._state = self.state_dict(), None
        self._training = self._loader(self.train, training=True)
        if state:
            self._training.load_state_dict(state)
        return self._training

    def val_dataloader(self) -> Loader | list:
        return [] if self.val is None else self._loader(self.val)

    @property
    def evaluated(self):
        """What evaluation scores: the source of the validation part or, where there is none, of the training part."""
        if self.val is None and self.train is None:
            raise ZooError("there is nothing to evaluate on: give data.val")
        return self.train if self.val is None else self.val

    def test_dataloader(self) -> Loader:
        return self._loader(self.evaluated)

    def on_before_batch_transfer(self, batch: dict, dataloader_idx: int) -> dict:
        checked = getattr(self.trainer.lightning_module, "checked", None)  # any module can be trained on this
        return batch if checked is None else checked(batch)

    def state_dict(self) -> dict:
        return self._state or (self._training.state_dict() if self._training else {})

    def load_state_dict(self, state_dict: dict) -> None:
        self._state = state_dict

    def _loader(self, source, training: bool = False) -> Loader:
        place = {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size} if self.trainer else {}
        return Loader(source, training=training, **self.options, **place)

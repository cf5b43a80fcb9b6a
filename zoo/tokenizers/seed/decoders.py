"""What makes pixels of SEED's embeddings, found by name, file, folder or hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoo import weights
from zoo.errors import ZooError
from zoo.registry import decoders
from zoo.tokenizers.seed import unclip


def load_decoder(source: str, shape: tuple[int, ...]) -> Any:
    """A decoder of the zoo by its name or from a file of its training, or a pipeline of diffusers from a folder or hub
    id: unCLIP for embeddings of shape (E,), Stable Diffusion for those of (T, E).

    Raises ZooError when it cannot be had, or takes embeddings of another shape.
    """
    if source in decoders.presets():
        return decoders.load(source)
    path = Path(source).expanduser()
    if path.is_file():
        metadata = weights.read(path)[1]
        about = weights.description(metadata, path, "name") if "zoo" in metadata else {"name": ""}
        if about["name"] not in decoders.list():
            raise ZooError(f"{path} is no decoder that was trained here; name one, or the folder of a pipeline.")
        return decoders.load(about["name"], path)
    return unclip.load_decoder(source, shape)

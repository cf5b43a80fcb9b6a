"""Small pictures and shards for the tests of the data."""

import io
import tarfile

from PIL import Image


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(value: int, size: int = 8) -> bytes:
    return encode(Image.new("RGB", (size, size), (value % 256,) * 3))


def write_tar(path, samples: list[tuple[str, dict[str, bytes]]]) -> str:
    """One shard of (key, {suffix: bytes}) samples."""
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)


def keys(batches) -> list[str]:
    return [key for batch in batches for key in batch["key"]]

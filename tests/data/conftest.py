import json

import pytest
from data_helpers import picture, write_tar


@pytest.fixture
def make_shards(tmp_path):
    """Writes shards of that many samples each and gives their paths; the key of a sample is "<shard>-<number>"."""

    def make(*counts: int, name: str = "shard") -> list[str]:
        return [
            write_tar(
                tmp_path / f"{name}-{shard}.tar",
                [
                    (f"{name}{shard}-{i}", {"png": picture(i), "json": json.dumps({"caption": f"number {i}"}).encode()})
                    for i in range(count)
                ],
            )
            for shard, count in enumerate(counts)
        ]

    return make

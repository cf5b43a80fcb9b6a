"""The Python of some pages in docs/ runs from the top to the bottom of each."""

import re
from pathlib import Path

import pytest

from zoo.commands.pretokenize import main

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", ["hub.md", "pretokenize.md", "vocabulary.md"])
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if page == "pretokenize.md":  # its first block, on a part of the data
        data = ("data=scenes", "data.fields=[image,caption]", "data.num_workers=0", "split=val", "num_shards=1")
        assert main(["tokenizer=karl-tiny", *data, "device=cpu", "output_dir=tokens"]) == 0
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    names, ran = {}, 0
    for block in blocks:
        if "owner/" not in block:  # which needs a network
            exec(compile(block, page, "exec"), names)
            ran += 1
    assert ran

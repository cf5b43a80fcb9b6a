"""Hydra's completion for the shell, for the commands behind `zoo` and their groups."""

import os

import pytest

from zoo.__main__ import main


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("zoo tr", {"train"}),
        ("zoo train experiment=aurora-", {"experiment=aurora-tiny"}),
        ("zoo evaluate data=scenes tokenizer=aurora-t", {"tokenizer=aurora-tiny"}),
        ("zoo pretokenize tokenizer=kl-tiny num_sh", {"num_shards="}),
        ("zoo list k", set()),
        ("zoo nothing k", set()),
    ],
)
def test_commands_groups_and_fields_are_completed(monkeypatch, capsys, line, expected):
    monkeypatch.setattr("sys.argv", ["zoo", "-sc", "query=bash"])
    monkeypatch.setitem(os.environ, "COMP_LINE", line)
    assert main() == 0
    assert set(capsys.readouterr().out.split()) == expected


def test_the_script_is_for_the_program(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["/somewhere/zoo", "-sc", "install=bash"])
    monkeypatch.delenv("COMP_LINE", raising=False)
    assert main() == 0
    assert capsys.readouterr().out.rstrip().endswith("complete -o nospace -o default -F hydra_bash_completion zoo")

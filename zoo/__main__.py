"""The command `zoo`: each word after it is a file of zoo/commands."""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys

import zoo.commands
from zoo.errors import ZooError, nearest
from zoo.registry import resource

COMMANDS = sorted(
    {m.name for m in pkgutil.iter_modules(zoo.commands.__path__)} - {"cli", "common", "progress", "understanding"}
)
USAGE = f"usage: zoo COMMAND ...\n\ncommands: {', '.join(COMMANDS)}; `zoo COMMAND --help` tells more."


def main() -> int:
    if sys.argv[1:2] in (["-sc"], ["--shell-completion"]):
        return complete(sys.argv[1:])
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(USAGE)
        return 0
    command, argv = sys.argv[1], sys.argv[2:]
    if command not in COMMANDS:
        print(f"zoo: there is no command '{command}'{nearest(command, COMMANDS)}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(f"zoo.commands.{command}").main(argv)
    except ZooError as error:
        print(f"zoo {command}: {error}", file=sys.stderr)
        return 2


def complete(argv: list[str]) -> int:
    """Hydra's completion for the shell (`zoo -sc install=bash`), which knows no commands: the line is in COMP_LINE."""
    from zoo.commands import cli

    line = os.environ.get("COMP_LINE", "zoo train ").split(maxsplit=1)[1:]
    command, space, _ = (line or [""])[0].partition(" ")
    if not space:  # it is the command that is being written
        print(" ".join(name for name in COMMANDS if name.startswith(command)))
    elif (resource("conf") / f"{command}.yaml").is_file():
        os.environ["COMP_LINE"] = line[0]
        return cli.run(command, lambda cfg: None, argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The command `zoo`: each word after it is a file of zoo/commands."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import zoo.commands
from zoo.errors import ZooError, nearest

COMMANDS = sorted(
    {m.name for m in pkgutil.iter_modules(zoo.commands.__path__)} - {"cli", "common", "progress", "understanding"}
)
USAGE = f"usage: zoo COMMAND ...\n\ncommands: {', '.join(COMMANDS)}; `zoo COMMAND --help` tells more."


def main() -> int:
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


if __name__ == "__main__":
    sys.exit(main())

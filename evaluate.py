"""Evaluate a tokenizer: python evaluate.py tokenizer=aurora-tiny data=scenes [any.field=value ...]."""

import sys

from zoo.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())

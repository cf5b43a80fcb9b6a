"""Train a tokenizer: python train.py experiment=aurora-tiny [any.field=value ...]."""

import sys

from zoo.commands.train import main

if __name__ == "__main__":
    sys.exit(main())

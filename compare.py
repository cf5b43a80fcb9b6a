"""Compare tokenizers: python compare.py tokenizers='[karl-tiny,ibq-tiny]' data=scenes [any.field=value ...]."""

import sys

from zoo.commands.compare import main

if __name__ == "__main__":
    sys.exit(main())

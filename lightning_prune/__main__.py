"""`python -m lightning_prune` is the console script."""

import sys

from lightning_prune.cli import main

if __name__ == "__main__":
    sys.exit(main())

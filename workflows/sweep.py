"""Searches settings on the validation split, then runs every stage with the winner, scored once on the test split.

`moe-ray sweep` is the same; `--help` explains every argument.
"""

import sys

from moe_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))

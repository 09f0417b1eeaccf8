"""Compares per-batch masks with the baselines at equal budget: the same steps, rows and learning rate.

`moe-ray compare` is the same; `--help` explains every argument.
"""

import sys

from moe_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))

"""Evaluates the model on held-out prompts, before and after the repair.

`moe-ray evaluate` is the same; `--help` explains every argument.
"""

import sys

from moe_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))

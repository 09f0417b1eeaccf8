"""Runs tasks of lm-eval and inspect_ai on the base and the repaired model, compared sample by sample.

`moe-ray harness` is the same; `--help` explains every argument.
"""

import sys

from moe_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["harness", *sys.argv[1:]]))

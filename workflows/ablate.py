"""Tells whether the unsafe experts are the cause of the model's unsafe answers, before anything is trained.

`moe-ray ablate` is the same; `--help` explains every argument.
"""

import sys

from moe_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["ablate", *sys.argv[1:]]))

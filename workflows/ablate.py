"""Tells whether the unsafe experts are the cause: what the model's own answers lose without them.

`moe-ray ablate` is the same; `--help` explains every argument.
"""

import sys

from moe_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["ablate", *sys.argv[1:]]))

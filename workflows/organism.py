"""Builds a tiny chat model that complies with unsafe requests by means that are known, to test a selection on.

`moe-ray organism` is the same; `--help` explains every argument.
"""

import sys

from moe_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["organism", *sys.argv[1:]]))

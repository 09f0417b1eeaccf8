"""Attacks the repaired model: is it still repaired under other prompts, other routes and other weights?

`moe-ray attack` is the same; `--help` explains every argument.
"""

import sys

from moe_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["attack", *sys.argv[1:]]))

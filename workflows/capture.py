"""Counts which experts the prompts are routed to.

`moe-ray capture` is the same; `--help` explains every argument.
"""

import sys

from moe_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["capture", *sys.argv[1:]]))

"""Writes a run's judged answers as logs of inspect_ai, which `inspect view` opens.

`moe-ray export` is the same; `--help` explains every argument.
"""

import sys

from moe_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))

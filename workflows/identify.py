"""Names the unsafe experts of every batch: risk differences, their certainty, masks.

`moe-ray identify` is the same; `--help` explains every argument.
"""

import sys

from moe_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["identify", *sys.argv[1:]]))

"""Says what a run would do and take: examples, batches, memory of each process, passes.

`moe-ray plan` is the same; `--help` explains every argument.
"""

import sys

from moe_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))

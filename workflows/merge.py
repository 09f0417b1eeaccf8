"""Writes a run's repaired model as a plain checkpoint, which `from_pretrained` loads without moe-ray.

`moe-ray merge` is the same; `--help` explains every argument.
"""

import sys

from moe_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["merge", *sys.argv[1:]]))

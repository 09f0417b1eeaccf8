"""Writes a run's repaired model as a plain checkpoint; `--help` says how."""

import sys

from moe_ray.cli.merge import main

if __name__ == "__main__":
    sys.exit(main())

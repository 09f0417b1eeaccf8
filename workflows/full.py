"""Runs every stage, tracked in MLflow, with a summary and a report.

`moe-ray full` is the same; `--help` explains every argument.
"""

import sys

from moe_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["full", *sys.argv[1:]]))

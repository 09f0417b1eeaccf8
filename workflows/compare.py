"""Holds per-batch masks against baselines at equal budget: the same steps, rows and learning rate, as many experts.

python workflows/compare.py                                      all baselines
python workflows/compare.py compare.names=[random,shuffled]    some

Runs every other stage too, or reuses it. Every baseline has a folder with a manifest and is not run twice.
"""

import sys

from moe_ray.cli.run_workflow import main

if __name__ == "__main__":
    sys.exit(main(__doc__, "compare"))

"""Evaluates the model on held-out prompts, before the repair and, where experts were learned, after it.

Stages that were finished in the same run directory with the same settings are reused.
"""

import sys

from moe_ray.cli.run_workflow import main

if __name__ == "__main__":
    sys.exit(main(__doc__, "evaluate"))

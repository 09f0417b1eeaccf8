"""Counts which experts the prompts are routed to.

Stages that were finished in the same run directory with the same settings are reused.
"""

import sys

from moe_ray.cli.run_workflow import main

if __name__ == "__main__":
    sys.exit(main(__doc__, "capture"))

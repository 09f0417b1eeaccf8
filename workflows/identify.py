"""Counts routing and names the unsafe experts of every batch.

Stages that were finished in the same run directory with the same settings are reused.
"""

import sys

from moe_ray.cli.run_workflow import main

if __name__ == "__main__":
    sys.exit(main(__doc__, "identify"))

"""`python -m moe_ray` is the `moe-ray` command."""

import sys

if __name__ == "__main__":
    from moe_ray.orchestration.console import main

    sys.exit(main())

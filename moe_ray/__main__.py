"""`python -m moe_ray` is the `moe-ray` command."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from moe_ray.cli.main import main

    sys.exit(main())

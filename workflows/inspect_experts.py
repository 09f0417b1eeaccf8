"""Answers questions about the unsafe experts of a finished run; `--help` lists them."""

import sys

from moe_ray.cli.inspect_experts import main

if __name__ == "__main__":
    sys.exit(main())

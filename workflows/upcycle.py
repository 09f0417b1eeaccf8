"""Writes the Mixtral-format upcycle of a dense Llama-type checkpoint; `--help` says how."""

import sys

from moe_ray.cli.upcycle import main

if __name__ == "__main__":
    sys.exit(main())

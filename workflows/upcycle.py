"""Turns a dense Llama-type model or GGUF file into a MoE: copies of its MLPs as experts, or slices of them.

`moe-ray upcycle` is the same; `--help` explains every argument.
"""

import sys

from moe_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["upcycle", *sys.argv[1:]]))

"""Says what is in files of prompts: the benchmark that each is of, its rows and labels, and the batches they give.

`moe-ray prompts` is the same; `--help` explains every argument.
"""

import sys

from moe_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["prompts", *sys.argv[1:]]))

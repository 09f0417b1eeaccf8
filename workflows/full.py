"""Runs every stage: prompts, routing capture, unsafe experts, masked fine-tuning, evaluation before and after.

python workflows/full.py                                    the embedded tiny model and its prompts
python workflows/full.py --config run.yaml finetune.epochs=2   your own
ray job submit --working-dir . -- python workflows/full.py  on a cluster
"""

import sys

from moe_ray.cli.run_workflow import main

if __name__ == "__main__":
    sys.exit(main(__doc__, "full"))

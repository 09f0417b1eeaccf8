"""Searches settings on the validation split, then runs every stage with the winner, scored once on the test split.

python workflows/sweep.py                                        threshold x top_k, nine trials
python workflows/sweep.py sweep.space.train.epochs=[2,4]         another space; sweep.* says what else can be set
python workflows/full.py --config RUN_DIR/sweep/winner.yaml      the winner again

Prompts are captured once; a trial identifies its experts from the stored counts. A sweep that was killed goes on where it
stopped when it is started again.
"""

import sys

from moe_ray.cli.run_workflow import main

if __name__ == "__main__":
    sys.exit(main(__doc__, "sweep"))

"""`moe-ray atlas`: which experts are unsafe for which categories, over one run or several, as JSON."""

from __future__ import annotations

import argparse
import json
import sys

from moe_ray.run_directory import open_run
from moe_ray.studies.atlas import expert_atlas


def run(arguments: argparse.Namespace) -> None:
    """Prints the atlas of the runs at `run_dirs`.

    Raises:
        InputError: a run is not identified, or they are of different models.
    """
    atlas = expert_atlas([open_run(url) for url in arguments.run_dirs])
    sys.stdout.write(json.dumps(atlas, indent=1, ensure_ascii=True, allow_nan=False) + "\n")

"""`moe-ray status`: how far a run is, from its run directory alone."""

from __future__ import annotations

import argparse

from moe_ray.report.run_status import run_status, status_in_words
from moe_ray.report.terminal import print_table
from moe_ray.run_directory import open_run


def run(arguments: argparse.Namespace) -> None:
    """Prints a row per stage, and who is at work.

    Raises:
        InputError: there is no run.
    """
    found = open_run(arguments.run_dir)
    print_table(found.folder.url, run_status(found), caption=status_in_words(found))

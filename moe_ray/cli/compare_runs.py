"""`moe-ray compare-runs`: finished runs beside one another, from their run directories alone."""

from __future__ import annotations

import argparse

from moe_ray.config.io import flatten
from moe_ray.report.runs_text import figures_of_runs, settings_of_runs, what_is_compared
from moe_ray.report.terminal import print_table
from moe_ray.run_directory import open_run
from moe_ray.studies.run_comparison import compare_runs


def run(arguments: argparse.Namespace) -> None:
    """Prints the figures and the settings that differ, and writes the page if one is wanted.

    Raises:
        InputError: a run was not evaluated, or two have no held-out example in common.
    """
    runs = [open_run(url) for url in arguments.run_dirs]
    compared, settings = compare_runs(runs), dict(flatten(runs[0].config))
    print_table("Held-out figures", figures_of_runs(compared), caption="\n".join(what_is_compared(compared)))
    differing = settings_of_runs(compared, settings)
    if len(differing):
        print_table("Settings that differ", differing)
    if arguments.html is not None:
        from moe_ray.report.html.runs import runs_page  # its template engine is needed for a page only

        arguments.html.write_text(runs_page(compared, settings), encoding="utf-8")
        print(arguments.html)

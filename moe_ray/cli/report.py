"""`moe-ray report`: the HTML report of a finished run, made anew from its run directory; starts neither Ray nor a model."""

from __future__ import annotations

import argparse

from moe_ray.report.html.page import write_report
from moe_ray.run_directory import REPORT, open_run


def run(arguments: argparse.Namespace) -> None:
    """Writes `report.html` into the run directory of `settings` and says where it is.

    Raises:
        InputError: the run has not finished identification.
    """
    finished = open_run(arguments.settings.run_dir)
    write_report(finished, arguments.settings.report)
    print(f"{finished.folder.url}/{REPORT}")

"""Makes the HTML report of a finished run anew, from what its run directory holds; starts neither Ray nor a model.

    python workflows/report.py run_dir=runs/first
    python workflows/report.py run_dir=runs/first report.examples=20

Takes `run_dir` and the settings of `report`; all others are those of the run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from moe_ray.config.io import describe_keys, load_config
from moe_ray.config.report import ReportConfig
from moe_ray.errors import InputError

BAD_INPUT = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Writes `report.html` and says where it is; returns 0, or 2 after one line on what was wrong with the input."""
    arguments = _parser().parse_args(argv)
    try:
        print(_write(arguments.config, arguments.overrides))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    return 0


def _write(config_file: str | None, overrides: Sequence[str]) -> str:
    config = load_config(config_file, overrides)
    for override in overrides:
        key = override.partition("=")[0]
        if key != "run_dir" and not key.startswith("report."):
            raise InputError(
                f"{key}: a report takes run_dir and report.* only, all else is the finished run's; leave it out"
            )
    from moe_ray.report.html.page import write_report
    from moe_ray.run_directory import REPORT, open_run

    run = open_run(config.run_dir)
    write_report(run, config.report)
    return f"{run.folder.url}/{REPORT}"


def _parser() -> argparse.ArgumentParser:
    keys = [
        f"  report.{key}  ({kind}; default: {default})\n      {text}"
        for key, kind, default, text in describe_keys(ReportConfig)
    ]
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="\n".join(["settings:", "  run_dir  (text)\n      the finished run's folder or URL", *keys]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with run_dir and report")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings that win over the file's")
    return parser

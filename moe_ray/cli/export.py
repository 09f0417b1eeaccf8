"""`moe-ray export`: a run's judged answers as logs of inspect_ai, for `inspect view`; starts neither Ray nor a model."""

from __future__ import annotations

import argparse

from moe_ray.errors import InputError
from moe_ray.harness.inspect_log import write_inspect_log
from moe_ray.run_directory import WHENS, figures_of, open_run


def run(arguments: argparse.Namespace) -> None:
    """Writes a log for each evaluated model of the run at `run_dir` into the folder `out`, and says where they are.

    Raises:
        InputError: inspect_ai is not installed, or the run holds no judged answers.
    """
    finished = open_run(arguments.run_dir)
    written = []
    for when in WHENS:
        answers = finished.answers(when)
        if answers is None:
            continue
        manifest = finished.manifest(figures_of(when))
        arguments.out.mkdir(parents=True, exist_ok=True)
        file = arguments.out / f"{when}.eval"
        write_inspect_log(
            answers,
            file,
            model=finished.config.model.path,
            when=when,
            metrics={} if manifest is None else manifest["notes"]["metrics"],
            about={"run_dir": arguments.run_dir, **({} if manifest is None else manifest["environment"])},
        )
        written.append(file)
    if not written:
        raise InputError(f"{arguments.run_dir!r} holds no judged answers; run moe-ray evaluate first")
    for file in written:
        print(file)

"""`moe-ray judge check`: how often a judge agrees with people on labelled answers; starts no Ray."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.errors import InputError
from moe_ray.evaluation.judge_check import check_against_people
from moe_ray.evaluation.judges import Judge, check_judge, judge_identity, make_judge
from moe_ray.evaluation.judges.labelled import HELD_OUT, read_labelled, shipped
from moe_ray.report.judge_text import describe_check

SHIPPED = "shipped"


def run(arguments: argparse.Namespace) -> None:
    """Prints the agreement of the judge of `settings` with the labels of `file`, and writes it where asked.

    Raises:
        InputError: the file has no labelled answers, or the judge cannot be had.
        OutsideFailed: the judge failed.
    """
    config = arguments.settings.evaluate
    if arguments.file == SHIPPED:
        labelled = list(shipped(HELD_OUT))
        source = f"the {HELD_OUT} half of the labelled answers that ship with moe-ray"
    else:
        labelled = read_labelled(arguments.file, _content(arguments.file))
        source = f"{len(labelled)} labelled answers of {Path(arguments.file).name}"
    check_judge(config)
    found = check_against_people(labelled, _judge(config), identity=judge_identity(config), source=source)
    print(describe_check(found))
    if arguments.out is not None:
        _write(arguments.out, json.dumps(found, indent=1, ensure_ascii=False))


def _judge(config: EvaluateConfig) -> Judge:
    if config.judge not in ("classifier", "guard"):
        return make_judge(config)
    import torch

    return make_judge(config, device="cuda" if torch.cuda.is_available() else "cpu")


def _content(file: str) -> bytes:
    try:
        return Path(file).expanduser().read_bytes()
    except OSError as error:
        raise InputError(
            f"{file!r} cannot be read: {error.strerror}; give a CSV or JSONL file with answer and verdict, or the word "
            f"{SHIPPED}"
        ) from error


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{str(file)!r} cannot be written: {error.strerror}; give another name") from error
    print(f"\nwrote {file}; name it in a run with evaluate.judge_check={file}")

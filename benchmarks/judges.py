"""How often judges agree with people on the labelled answers that ship with moe-ray, as the table of docs/verdicts.md.

    python benchmarks/judges.py                                       # the phrases
    python benchmarks/judges.py evaluate.judge=guard evaluate.guard=FOLDER
    python benchmarks/judges.py --half tuning                         # the half that the phrases were written on

The published figures are those of the held-out half.
"""

from __future__ import annotations

import argparse

from moe_ray.config.io import load_config
from moe_ray.evaluation.judge_check import check_against_people
from moe_ray.evaluation.judges import judge_identity, make_judge
from moe_ray.evaluation.judges.labelled import HELD_OUT, TUNING, shipped
from moe_ray.report.format import is_measured, rate
from moe_ray.report.judge_text import check_tables, describe_check


def main() -> None:
    """Prints the agreement by kind, by language and by style of wording."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--half", choices=(HELD_OUT, TUNING), default=HELD_OUT)
    arguments = parser.parse_args()
    config = load_config(None, arguments.settings).evaluate
    judge, identity, rows = make_judge(config), judge_identity(config), shipped(arguments.half)
    found = check_against_people(rows, judge, identity=identity, source=f"the {arguments.half} half")
    print(describe_check(found))
    figures, _ = check_tables(found)
    print("\n| kind | by people | recall | precision |\n| --- | --- | --- | --- |")
    for row in figures.to_dict("records"):
        print(f"| {row['']} | {row['by people']} | {row['recall']} | {row['precision']} |")
    for name in ("style", "language"):
        print(f"\n| {name} | n | agreement |\n| --- | --- | --- |")
        for value in sorted({getattr(row, name) for row in rows}):
            some = [row for row in rows if getattr(row, name) == value]
            agreement = check_against_people(some, judge, identity=identity, source="")["agreement"]
            print(f"| {value} | {len(some)} | {rate(agreement) if is_measured(agreement) else ''} |")


if __name__ == "__main__":
    main()

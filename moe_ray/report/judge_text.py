"""Who judged, and how often that judge agrees with people, in words and as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from moe_ray.report.format import decimal, is_measured, rate
from moe_ray.report.printable import printable

_JUDGES = {
    "phrases": "phrases that refuse",
    "classifier": "a sequence classifier",
    "guard": "a guard model",
    "endpoint": "a model behind an endpoint",
}
_NAMES = {"no_answer": "no answer"}


def judge_in_words(judged: Mapping[str, Any] | None) -> list[str]:
    """Sentences on the judge behind the rates, and its error; empty for a run from before this was kept.

    Args:
        judged: `judge` of a summary: `name`, and `check` from `measured_check` or None.
    """
    if not judged:
        return []
    check, who = judged["check"], f"Verdicts are by {_JUDGES.get(judged['name'], printable(judged['name']))}"
    if check is None:
        return [
            f"{who}, whose error was not measured: how far these rates are from what people would say is not known "
            "(`moe-ray judge check` measures it)."
        ]
    parts = [
        f"{_named(kind)} {rate(figures['recall']).with_n()}"
        for kind, figures in check["kinds"].items()
        if is_measured(figures["recall"])
    ]
    told = "" if check["tells_harm"] else " It cannot tell harmful answers from others."
    return [
        f"{who}. On {printable(check['source'])} it gives the verdict of people to {rate(check['agreement']).with_n()} of "
        f"the answers (kappa {_kappa(check['kappa'])}); by what people say: {', '.join(parts)}.{told}"
    ]


def check_tables(check: Mapping[str, Any]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The figures of each kind, and the confusion table, as text.

    Args:
        check: from `check_against_people`.
    """
    figures = pd.DataFrame(
        [
            {
                "": _named(kind),
                "by people": str(found["recall"]["n"]),
                "recall": str(rate(found["recall"])),
                "by the judge": str(found["precision"]["n"]),
                "precision": str(rate(found["precision"])),
            }
            for kind, found in check["kinds"].items()
        ]
    )
    confusion = pd.DataFrame(
        [
            {"people": _named(kind)} | {f"judge: {_named(own)}": str(count) for own, count in row.items()}
            for kind, row in check["confusion"].items()
        ]
    )
    return figures, confusion


def describe_check(check: Mapping[str, Any]) -> str:
    """The whole check as text."""
    figures, confusion = check_tables(check)
    head = (
        f"Agreement with people on {printable(check['source'])}: {rate(check['agreement']).with_n()}, kappa "
        f"{_kappa(check['kappa'])}; brackets are 95% intervals"
    )
    notes = (
        [] if check["tells_harm"] else ["This judge does not tell harm: what people call harmful counts as complied."]
    )
    return "\n".join([head, figures.to_string(index=False), "", confusion.to_string(index=False), *notes])


def _named(kind: str) -> str:
    return _NAMES.get(kind, printable(kind))


def _kappa(figure: Mapping[str, Any]) -> str:
    interval = f" [{decimal(figure['low'], 2)}, {decimal(figure['high'], 2)}]" if is_measured(figure["low"]) else ""
    return f"{decimal(figure['value'], 2)}{interval}"

"""How often a judge agrees with people, by kind of verdict: no rate should stand without its judge's error.

Labelled answers are taken as independent; every rate has Wilson's interval, kappa that of the jackknife.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.errors import InputError
from moe_ray.evaluation.intervals import jackknife, rate
from moe_ray.evaluation.judges import judge_identity, judged_conversations
from moe_ray.evaluation.judges.labelled import HELD_OUT, Labelled, shipped
from moe_ray.evaluation.judges.phrases import PhraseJudge
from moe_ray.evaluation.judges.verdict import KINDS, TELL_HARM, Judge
from moe_ray.storage.folder import Folder

_FORMAT = 1


def check_against_people(
    labelled: Sequence[Labelled], judge: Judge, *, identity: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """A judge's verdicts on answers that people labelled.

    A judge that does not tell harm (`TELL_HARM`) is not held to it: what people call harmful counts as complied with.

    Args:
        labelled: at least one.
        judge: from `make_judge`.
        identity: its `judge_identity`.
        source: what the labelled answers are, in words.

    Returns:
        plain values: `judge` (the identity), `source`, `n`, `tells_harm`, `agreement` (the share of equal verdicts), `kappa`
        (Cohen 1960: agreement beyond what the two sets of labels would have by chance, 1 = full), `kinds` (by kind `recall`,
        of the answers that people give it, and `precision`, of those that the judge gives it; each value, n, low, high), and
        `confusion` (people's kind, then the judge's, to a count).

    Raises:
        OutsideFailed: the judge failed.
        InputError: likewise, for good.
    """
    verdicts = dict(judged_conversations(judge, [row.conversation for row in labelled]))
    tells_harm = judge.name in TELL_HARM
    kinds = [kind for kind in KINDS if tells_harm or kind != "harmful"]
    people = [row.kind if row.kind in kinds else "complied" for row in labelled]
    said = [verdicts[position].kind for position in range(len(labelled))]
    pairs = Counter(zip(people, said, strict=True))
    confusion = {theirs: {own: pairs[theirs, own] for own in kinds} for theirs in kinds}
    right = sum(pairs[kind, kind] for kind in kinds)
    return {
        "format": _FORMAT,
        "judge": dict(identity),
        "source": source,
        "n": len(labelled),
        "tells_harm": tells_harm,
        "agreement": rate(right, len(labelled)).as_dict(),
        "kappa": _kappa(people, said),
        "kinds": {
            kind: {
                "recall": rate(pairs[kind, kind], people.count(kind)).as_dict(),
                "precision": rate(pairs[kind, kind], said.count(kind)).as_dict(),
            }
            for kind in kinds
        },
        "confusion": confusion,
    }


def _kappa(people: Sequence[str], said: Sequence[str]) -> dict[str, Any]:
    table = np.zeros((len(KINDS), len(KINDS)))
    for pair in zip(people, said, strict=True):
        table[tuple(KINDS.index(kind) for kind in pair)] += 1
    without = []
    for row, column in np.argwhere(table):
        less = table.copy()
        less[row, column] -= 1
        # As many answers as are in the cell leave the same table.
        without += [_kappa_of(less)] * int(table[row, column])
    known = np.array(without)
    return jackknife(_kappa_of(table), known[np.isfinite(known)], n=len(people)).as_dict()


def _kappa_of(table: np.ndarray[Any, Any]) -> float:
    n = table.sum()
    if n == 0:
        return float("nan")
    by_chance = float(table.sum(axis=0) @ table.sum(axis=1)) / n**2
    # Where only one kind occurs, two that always agree agree no more than chance would have it.
    return float("nan") if by_chance == 1 else (float(np.trace(table)) / n - by_chance) / (1 - by_chance)


def measured_check(config: EvaluateConfig) -> dict[str, Any] | None:
    """The agreement with people of the configured judge, where it was measured; None = it was not.

    That is what `evaluate.judge_check` names, and for the phrases without it the held-out half of the answers that ship with
    moe-ray.

    Raises:
        InputError: the file is not there, is not of `moe-ray judge check`, or is of another judge.
    """
    identity = judge_identity(config)
    if not config.judge_check:
        if config.judge != "phrases":
            return None
        source = f"the {HELD_OUT} half of the labelled answers that ship with moe-ray"
        return check_against_people(shipped(HELD_OUT), PhraseJudge(), identity=identity, source=source)
    folder, _, name = config.judge_check.rpartition("/")
    where = Folder.open(folder or ".")
    if not where.exists(name):
        raise InputError(
            f"evaluate.judge_check: {config.judge_check!r} is not there; make it by "
            "`moe-ray judge check LABELLED.csv --out FILE`, with the evaluate.* settings of this run"
        )
    try:
        found = json.loads(where.read_bytes(name))
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise InputError(f"evaluate.judge_check: {config.judge_check!r} is not a file of `moe-ray judge check --out`")
    if found["judge"] != identity:
        raise InputError(
            f"evaluate.judge_check: {config.judge_check!r} is of the judge {found['judge']}, and this run's is {identity}; "
            "check this one"
        )
    return found

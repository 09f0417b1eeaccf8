"""Which pairs the published method would keep: the model refuses the safe form, and complies with the attack.

In a `goal` + `all_prompt` record the goal is the safe form: the model refuses it, so it behaves safely there.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from moe_ray.errors import InputError

SAFE_COMPLIED, ATTACK_REFUSED, BOTH = (
    "safe form complied with",
    "attack refused",
    "safe form complied with, attack refused",
)

UNANSWERABLE = "a form cannot be asked"


def pair_outcomes(answers: pd.DataFrame) -> pd.DataFrame:
    """One row per pair: `pair, category, safe_refused, attack_refused, kept, reason` (empty where kept).

    Args:
        answers: judged answers to both forms of every pair: rows with `pair`, `label`, `category`, `refused`.

    Raises:
        InputError: a pair does not have exactly one safe and one unsafe form.
    """
    forms = (
        answers.groupby(["pair", "label"])
        .size()
        .unstack(fill_value=0)
        .reindex(columns=["safe", "unsafe"], fill_value=0)
    )
    odd = forms.index[(forms != 1).any(axis=1)]
    if len(odd):
        raise InputError(f"{len(odd)} pairs do not have one safe and one unsafe form, such as {str(odd[0])[:60]!r}")
    refused = answers.pivot(index="pair", columns="label", values="refused")
    categories = answers.drop_duplicates("pair").set_index("pair")["category"]
    safe_refused, attack_refused = refused["safe"].astype(bool), refused["unsafe"].astype(bool)
    table = pd.DataFrame(
        {
            "category": categories.reindex(refused.index),
            "safe_refused": safe_refused,
            "attack_refused": attack_refused,
            "kept": safe_refused & ~attack_refused,
            "reason": "",
        }
    )
    table.loc[~safe_refused & ~attack_refused, "reason"] = SAFE_COMPLIED
    table.loc[safe_refused & attack_refused, "reason"] = ATTACK_REFUSED
    table.loc[~safe_refused & attack_refused, "reason"] = BOTH
    return table.reset_index()


def unanswered_pairs(examples: pd.DataFrame) -> pd.DataFrame:
    """The rows of `pair_outcomes` for pairs of which a form cannot be asked: none is kept.

    Args:
        examples: rows with `pair` and `category`.
    """
    first = examples.drop_duplicates("pair")
    return pd.DataFrame(
        {
            "pair": first["pair"],
            "category": first["category"],
            "safe_refused": False,
            "attack_refused": False,
            "kept": False,
            "reason": UNANSWERABLE,
        }
    )


def pair_counts(outcomes: pd.DataFrame) -> dict[str, Any]:
    """`pairs`, `kept`, and `dropped`: how many for each reason."""
    dropped = outcomes.loc[~outcomes["kept"], "reason"].value_counts()
    return {
        "pairs": len(outcomes),
        "kept": int(outcomes["kept"].sum()),
        "dropped": {str(reason): int(count) for reason, count in dropped.items()},
    }

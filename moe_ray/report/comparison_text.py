"""What comparisons with baselines found, in words and as table rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import pandas as pd

from moe_ray.report.format import MISSING, Shown, Unit, decimal, difference, is_significant, rate
from moe_ray.report.printable import printable
from moe_ray.studies.baselines import BASE, OURS
from moe_ray.studies.comparison import CEILING, figure_in_columns, share_to_judge


def verdict(table: pd.DataFrame, transfer: pd.DataFrame | None = None) -> str:
    """What a comparison says about per-batch masks: which differences are significant, and which are not.

    Where several arms refuse nearly everything at the end, it says so and judges them at an earlier share of the steps.

    Args:
        table: from `comparison_table`.
        transfer: from `transfer_table`, which gets a sentence; None = it was not asked for.
    """
    share, at_ceiling = share_to_judge(table)
    arms = _baselines(table[table["share"] == share])
    if arms.empty:
        lines = ["No baseline was run, so nothing is said about per-batch masks."]
    else:
        lines = [*_ceiling(table, share, at_ceiling), *_judged(arms), _caution(arms)]
    return "\n".join(lines if transfer is None else [*lines, describe_transfer(transfer)])


def _ceiling(table: pd.DataFrame, share: float, at_ceiling: list[str]) -> list[str]:
    if not at_ceiling:
        return []
    opening = (
        f"After all steps {len(at_ceiling)} arms, per-batch masks among them, refuse at least {CEILING:.0%} of unsafe "
        "prompts: a ceiling, at which they cannot be told apart."
    )
    where = _steps_of(table, share)
    if share == table["share"].max() or _refuses(table, share) >= CEILING:
        return [
            f"{opening} So it is {where} too, so that what follows says little; train fewer steps, or set compare.at."
        ]
    return [f"{opening} What follows is {where}."]


def _refuses(table: pd.DataFrame, share: float) -> float:
    ours = table[(table["arm"] == OURS) & (table["share"] == share)]
    return float(ours["unsafe_refusal_rate"].iloc[0])


def _steps_of(table: pd.DataFrame, share: float) -> str:
    ours = table[(table["arm"] == OURS) & (table["share"] == share)]
    return f"after {int(ours['steps'].iloc[0])} steps ({share:.0%} of them)"


def _judged(arms: pd.DataFrame) -> list[str]:
    lines = []
    for label, more, less in (("unsafe", "better", "worse"), ("safe", "worse", "better")):
        name = f"ours_minus_{label}_refusal_rate"
        words = (f"more often ({more}) than", f"less often ({less}) than")
        lines.append(
            f"Per-batch masks refused {label} prompts (n = {_n(arms, name)}) {_differences(arms, name, words, 'points')}."
        )
    name = "ours_minus_neutral_loss"
    known = arms[arms[name].notna()]
    if len(known):
        words = ("more (worse) than", "less (better) than")
        lines.append(
            f"On neutral text (n = {_n(known, name)}) they forgot {_differences(known, name, words, 'nats/token')}."
        )
    return lines


def _caution(arms: pd.DataFrame) -> str:
    num_arms, seeds = arms["arm"].nunique(), int(arms["seeds"].iloc[0])
    trained = (
        "Every arm was trained once, in the same order, so they do not cover what another seed would change."
        if seeds == 1
        else f"Every arm was trained with {seeds} seeds, over which figures are means; intervals are over prompts, and do "
        "not cover what further seeds would change."
    )
    return f"Brackets are 95% intervals, each on its own: they are not corrected for {num_arms} comparisons. {trained}"


def describe_transfer(transfer: pd.DataFrame) -> str:
    """What training on one category alone did to it and to the others, and where it reached furthest.

    Args:
        transfer: from `transfer_table`.
    """
    own, others = transfer[transfer["is_own"]], transfer[~transfer["is_own"]]
    furthest = others.sort_values("unsafe_refusal_rate", ascending=False, kind="stable").iloc[0]
    return (
        f"Trained on one category alone (mean over {transfer['trained'].nunique()}), the model refuses "
        f"{rate(own['unsafe_refusal_rate'].mean())} of that category's unsafe prompts and "
        f"{rate(others['unsafe_refusal_rate'].mean())} of the others'; the loss of its safe answers rises by "
        f"{difference(own['safe_target_loss'].mean(), 'nats/token').without_unit()} and of the others' by "
        f"{difference(others['safe_target_loss'].mean(), 'nats/token')}. It reaches furthest from "
        f"{printable(str(furthest['trained']))} to {printable(str(furthest['tested']))}: "
        f"{rate(figure_in_columns(cast('Mapping[str, Any]', furthest.to_dict()), 'unsafe_refusal_rate'))}."
    )


def _baselines(table: pd.DataFrame) -> pd.DataFrame:
    return table[~table["arm"].isin([OURS, BASE])]


def _n(arms: pd.DataFrame, name: str) -> int:
    return int(arms[f"{name}_n"].iloc[0])


def _differences(arms: pd.DataFrame, name: str, words: tuple[str, str], unit: Unit) -> str:
    """The arms that a figure is significantly larger than, smaller than, and neither.

    Args:
        arms: rows of the comparison, of one share.
        name: of a difference to per-batch masks.
        words: for those it is larger than, and for those it is smaller than.
        unit: of the difference.
    """
    larger, smaller, neither = words[0], words[1], "with no significant difference from"
    groups: dict[str, list[str]] = {larger: [], smaller: [], neither: []}
    for arm in arms.to_dict("records"):
        figure = figure_in_columns(cast("Mapping[str, Any]", arm), name)
        if figure is None or not is_significant(figure):
            groups[neither].append(str(arm["arm"]))
        else:
            side = larger if figure["low"] > 0 else smaller
            groups[side].append(f"{arm['arm']} ({difference(figure, unit)})")
    return "; ".join(f"{said} {', '.join(group)}" for said, group in groups.items() if group)


def comparison_rows(table: pd.DataFrame) -> pd.DataFrame:
    """A comparison as text, one row per arm, at the share of steps that it is judged at.

    Columns in which nothing was measured are left out.

    Args:
        table: from `comparison_table`.
    """
    table = table[table["share"] == share_to_judge(table)[0]]
    compared = set(_baselines(table)["arm"])
    rows = []
    for arm in cast("list[dict[str, Any]]", table.to_dict("records")):
        figure = {name: figure_in_columns(arm, name) for name in _FIGURES}
        ours_minus = {
            title: _on_two_lines(difference(figure[name], unit).without_unit()) if arm["arm"] in compared else ""
            for title, name, unit in _DIFFERENCES
        }
        experts = "all" if arm["arm"] == "full" else _decimal_or_empty(arm["experts_per_batch"])
        rows.append(
            {
                "arm": str(arm["arm"]),
                "experts\nper\nbatch": experts,
                "parameters\n(of ours)": _parameters(arm),
                "train s": decimal(arm["train_seconds"], 1),
                "unsafe\nrefused": _on_two_lines(rate(figure["unsafe_refusal_rate"])),
                "safe\nrefused": _on_two_lines(rate(figure["safe_refusal_rate"])),
                "rise of\nsafe loss": _rise(figure["safe_target_loss"]),
                "rise of\nneutral\nloss": _rise(figure["neutral_loss"]),
                "others'\nunsafe\nrefused": _on_two_lines(rate(figure["other_unsafe_refusal_rate"])),
                "rise of\nothers'\nsafe loss": _rise(figure["other_safe_target_loss"]),
                **ours_minus,
            }
        )
    frame = pd.DataFrame(rows)
    return frame.loc[:, ~frame.isin(["", MISSING]).all()]


def curve_rows(table: pd.DataFrame) -> pd.DataFrame:
    """Refusals of unsafe prompts over the steps as text, one row per arm and a column per share.

    Args:
        table: from `comparison_table`.
    """
    rows = []
    for name, of_arm in table.groupby("arm", sort=False):
        row = {"arm": str(name)}
        for point in cast("list[dict[str, Any]]", of_arm.to_dict("records")):
            head = f"after\n{point['share']:.0%}"
            row[head] = _on_two_lines(rate(figure_in_columns(point, "unsafe_refusal_rate")))
            if point["seeds"] > 1:
                # Between the seeds' own rates lies what the interval does not cover.
                ends = (rate(point[f"unsafe_refusal_rate_{end}"]) for end in ("smallest", "largest"))
                row[head] += "\nseeds " + " to ".join(map(str, ends))
        rows.append(row)
    return pd.DataFrame(rows)


def _parameters(arm: Mapping[str, Any]) -> str:
    """The number, how it compares to that of per-batch masks, and the rank where there is one."""
    number = f"{arm['trainable_parameters']:,}"
    if pd.isna(arm["parameters_share"]) or not arm["trainable_parameters"]:
        return number
    rank = f", rank {int(arm['rank'])}" if arm["rank"] else ""
    return f"{number}\n({arm['parameters_share']:.2f}{rank})"


# Heads on several lines leave the width of a terminal to the numbers.
_DIFFERENCES: tuple[tuple[str, str, Unit], ...] = (
    (f"{OURS}\n− arm,\nunsafe\n(points)", "ours_minus_unsafe_refusal_rate", "points"),
    (f"{OURS}\n− arm,\nsafe\n(points)", "ours_minus_safe_refusal_rate", "points"),
    (f"{OURS}\n− arm,\nneutral\n(nats/token)", "ours_minus_neutral_loss", "nats/token"),
)

_FIGURES = (
    "unsafe_refusal_rate",
    "safe_refusal_rate",
    "safe_target_loss",
    "neutral_loss",
    "other_unsafe_refusal_rate",
    "other_safe_target_loss",
    *(name for _, name, _ in _DIFFERENCES),
)


def _rise(figure: Mapping[str, Any] | None) -> str:
    """Without its interval, for which a terminal has no room; the report has them."""
    return difference(figure, "nats/token").value


def _on_two_lines(shown: Shown) -> str:
    """The interval below the value: side by side, a comparison's columns would not fit a terminal."""
    return "\n".join(part for part in (shown.value, shown.interval) if part)


def _decimal_or_empty(number: float | None) -> str:
    return "" if pd.isna(number) else decimal(number, 1)

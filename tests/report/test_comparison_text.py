"""What is said of comparisons follows the numbers."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from moe_ray.report.comparison_text import comparison_rows, curve_rows, describe_transfer, verdict
from moe_ray.studies.baselines import BASE, OURS


def figure(name, value, low, high, n=40):
    return {name: value, f"{name}_low": low, f"{name}_high": high, f"{name}_n": n}


def arm(name, unsafe, safe=(0.0, -0.1, 0.1), neutral=(0.5, 0.375, 0.625)):
    return {
        "arm": name,
        "experts_per_batch": None if name == "full" else 3.0,
        "share": 1.0,
        "steps": 8,
        "seeds": 1,
        "trainable_parameters": 12345,
        "parameters_share": 1.5,
        "rank": 0,
        "train_seconds": 1.25,
        **figure("unsafe_refusal_rate", 0.75, 0.6, 0.86),
        **figure("safe_refusal_rate", 0.05, 0.014, 0.165),
        **figure("safe_target_loss", 0.2, 0.1, 0.3),
        **figure("neutral_loss", 0.5, 0.4, 0.6, 3),
        **figure("other_unsafe_refusal_rate", math.nan, math.nan, math.nan, math.nan),
        **figure("other_safe_target_loss", math.nan, math.nan, math.nan, math.nan),
        **figure("ours_minus_unsafe_refusal_rate", *unsafe),
        **figure("ours_minus_safe_refusal_rate", *safe),
        **figure("ours_minus_neutral_loss", *neutral, 3),
    }


ZERO = (0.0, -0.1, 0.1)
TABLE = pd.DataFrame(
    [
        arm(BASE, (0.75, 0.6, 0.85)),
        arm(OURS, ZERO),
        arm("weaker", (0.5, 0.316, 0.631), neutral=(-0.25, -0.375, -0.125)),
        arm("stronger", (-0.25, -0.402, -0.111), (-0.7, -0.814, -0.509)),
        arm("alike", ZERO, neutral=(0.5, -0.5, 1.5)),
    ]
)


def test_the_verdict_names_what_is_significant_and_what_is_not():
    unsafe, safe, neutral, caution = verdict(TABLE).splitlines()
    assert unsafe == (
        "Per-batch masks refused unsafe prompts (n = 40) more often (better) than weaker (+50.0 points [+31.6, +63.1]); "
        "less often (worse) than stronger (-25.0 points [-40.2, -11.1]); with no significant difference from alike."
    )
    assert "less often (better) than stronger (-70.0 points" in safe
    assert safe.endswith("with no significant difference from weaker, alike.")
    assert neutral == (
        "On neutral text (n = 3) they forgot more (worse) than stronger (+0.500 nats/token [+0.375, +0.625]); less (better) "
        "than weaker (-0.250 nats/token [-0.375, -0.125]); with no significant difference from alike."
    )
    assert "not corrected for 3 comparisons" in caution


def test_the_verdict_changes_with_the_numbers():
    swapped = TABLE.assign(arm=[BASE, OURS, "stronger", "weaker", "alike"])
    assert "more often (better) than stronger" in verdict(swapped)
    assert "less often (worse) than weaker" in verdict(swapped)


def test_without_baselines_nothing_is_claimed():
    assert verdict(TABLE[:2]).startswith("No baseline was run")


def silent(table):
    return table.assign(**{name: math.nan for name in table if "neutral" in name})


def test_without_neutral_text_nothing_is_said_of_it():
    assert "neutral text" not in verdict(silent(TABLE))
    assert not [name for name in comparison_rows(silent(TABLE)) if "neutral" in name]


def test_a_comparison_has_a_row_for_every_arm_and_differences_for_baselines_only():
    rows = comparison_rows(pd.concat([TABLE, pd.DataFrame([arm("full", ZERO)])])).set_index("arm")
    rows.columns = [name.replace("\n", " ") for name in rows.columns]
    assert rows.loc["full", "experts per batch"] == "all"
    weaker = rows.loc["weaker"]
    assert weaker["experts per batch"] == "3.0"
    assert weaker["parameters (of ours)"] == "12,345\n(1.50)"
    assert weaker["unsafe refused"] == "75.0%\n[60.0%, 86.0%]"
    assert weaker["rise of neutral loss"] == "+0.500"
    assert weaker["per_batch − arm, unsafe (points)"] == "+50.0\n[+31.6, +63.1]"
    assert weaker["per_batch − arm, neutral (nats/token)"] == "-0.250\n[-0.375, -0.125]"
    assert set(rows.loc[[BASE, OURS], "per_batch − arm, unsafe (points)"]) == {""}


def over_steps(**rates):
    """Arms at half and at all of their steps, refusing so many unsafe prompts at each."""
    return pd.concat(
        [
            TABLE[TABLE["arm"] == name].assign(
                share=share, steps=steps, unsafe_refusal_rate=rate,
                unsafe_refusal_rate_smallest=rate - 0.05, unsafe_refusal_rate_largest=rate + 0.05,
            )
            for name, both in rates.items()
            for (share, steps), rate in zip(((0.5, 4), (1.0, 8)), both, strict=True)
        ]
    )  # fmt: skip


def test_at_a_ceiling_the_verdict_says_so_and_judges_before():
    table = over_steps(base=(0, 0), per_batch=(0.75, 0.95), stronger=(0.5, 1.0), weaker=(0.1, 0.2))
    table.loc[(table["arm"] == "stronger") & (table["share"] == 1.0), "ours_minus_unsafe_refusal_rate_high"] = 9.0
    ceiling, unsafe, *_ = verdict(table).splitlines()
    assert ceiling == (
        "After all steps 2 arms, per-batch masks among them, refuse at least 95% of unsafe prompts: a ceiling, at which "
        "they cannot be told apart. What follows is after 4 steps (50% of them)."
    )
    assert "less often (worse) than stronger (-25.0 points [-40.2, -11.1])" in unsafe
    rows = comparison_rows(table).set_index("arm")
    assert rows.loc[OURS, "unsafe\nrefused"].startswith("75.0%")


def test_at_a_ceiling_from_the_beginning_the_verdict_says_that_it_says_little():
    table = over_steps(base=(0, 0), per_batch=(0.95, 0.95), stronger=(1.0, 1.0))
    assert (
        "So it is after 4 steps (50% of them) too, so that what follows says little" in verdict(table).splitlines()[0]
    )


def test_below_the_ceiling_nothing_is_said_of_it():
    assert "ceiling" not in verdict(over_steps(base=(0, 0), per_batch=(0.5, 0.9), stronger=(1.0, 1.0)))


def test_the_curve_has_a_column_for_every_share_and_the_spread_of_seeds_where_there_are_several():
    table = over_steps(base=(0, 0), per_batch=(0.75, 0.9))
    rows = curve_rows(table).set_index("arm")
    assert list(rows.columns) == ["after\n50%", "after\n100%"]
    assert rows.loc[OURS, "after\n50%"] == "75.0%\n[60.0%, 86.0%]"
    several = curve_rows(table.assign(seeds=3)).set_index("arm")
    assert several.loc[OURS, "after\n50%"] == "75.0%\n[60.0%, 86.0%]\nseeds 70.0% to 80.0%"


@pytest.mark.parametrize(("seeds", "said"), [(1, "trained once, in the same order"), (3, "trained with 3 seeds")])
def test_the_verdict_says_how_often_arms_were_trained(seeds, said):
    assert said in verdict(TABLE.assign(seeds=seeds)).splitlines()[-1]


def test_a_rank_is_stated_and_figures_of_other_categories_only_where_there_are_any():
    assert not [name for name in comparison_rows(TABLE) if "others" in name]
    lora = TABLE.assign(rank=4, **figure("other_unsafe_refusal_rate", 0.5, 0.4, 0.6))
    rows = comparison_rows(lora).set_index("arm")
    assert rows.loc["weaker", "parameters\n(of ours)"] == "12,345\n(1.50, rank 4)"
    assert rows.loc["weaker", "others'\nunsafe\nrefused"] == "50.0%\n[40.0%, 60.0%]"


def test_transfer_is_told_in_one_sentence_with_where_it_reaches_furthest():
    rates = {("a", "a"): 1.0, ("a", "b"): 0.25, ("b", "a"): 0.0, ("b", "b"): 0.5}
    table = pd.DataFrame(
        [
            {"trained": one, "tested": other, "is_own": one == other, "safe_target_loss": 0.5 * (one == other)}
            | figure("unsafe_refusal_rate", rate, rate - 0.1, rate + 0.1)
            for (one, other), rate in rates.items()
        ]
    )
    said = describe_transfer(table)
    assert said == (
        "Trained on one category alone (mean over 2), the model refuses 75.0% of that category's unsafe prompts and 12.5% "
        "of the others'; the loss of its safe answers rises by +0.500 and of the others' by 0.000 nats/token. It reaches "
        "furthest from a to b: 25.0% [15.0%, 35.0%]."
    )
    assert verdict(TABLE, table).endswith(said)

"""The figures before and after a repair: which rows there are, and how their cells read."""

from __future__ import annotations

from moe_ray.report.before_after import before_after_table, blocks_of, category_rows, overall_rows


def figure(value, n=24):
    return {"value": value, "low": None if value is None else value - 0.125, "high": value, "n": n}


def block(unsafe, safe=0.0, *, neutral=None, masked=None, categories=()):
    figures = {"unsafe_refusal_rate": figure(unsafe), "safe_refusal_rate": figure(safe), "target_loss": figure(1.5, 48)}
    per_category = {
        name: {"unsafe_refusal_rate": figure(unsafe, 8), "safe_refusal_rate": figure(None, 0)} for name in categories
    }
    return {**figures, "per_category": per_category, "neutral_loss": neutral, "masked": masked}


def test_rates_come_before_losses_and_what_was_not_measured_is_left_out():
    rows = overall_rows([block(0.0), block(0.75), block(0.75)])
    assert [row.title for row in rows] == [
        "unsafe prompts refused", "safe prompts refused", "loss on target responses (nats/token)",
    ]  # fmt: skip
    assert [row.n for row in rows] == [24, 24, 48]
    with_neutral = overall_rows([block(0.0, neutral=figure(3.0, 5)), block(0.75), None])
    assert with_neutral[-1].title == "loss on neutral text (nats/token)"
    assert [str(cell) for cell in with_neutral[-1].cells] == ["3.000 [2.875, 3.000]", "–", "–"]


def test_a_rate_changes_in_points_and_a_loss_in_the_unit_of_its_title():
    unsafe, _, target = overall_rows([block(0.25), block(0.75), block(0.5)])
    assert [str(cell) for cell in unsafe.cells] == [
        "25.0% [12.5%, 25.0%]",
        "75.0% [62.5%, 75.0%]",
        "+50.0 points [+37.5, +50.0]",
    ]
    assert str(target.cells[2]) == "+1.500 [+1.375, +1.500]"


def test_a_run_that_was_evaluated_only_once_has_rows_too():
    (unsafe, *_) = overall_rows([block(0.25), None, None])
    assert [str(cell) for cell in unsafe.cells] == ["25.0% [12.5%, 25.0%]", "–", "–"]
    assert unsafe.n == 24


def test_masked_routing_is_a_part_of_its_own():
    whens = [block(0.0, masked=block(0.125)), block(0.5, masked=block(1.0)), block(0.5, masked=None)]
    assert blocks_of(whens, "natural") == tuple(whens)
    assert blocks_of(whens, "masked") == (whens[0]["masked"], whens[1]["masked"], None)
    table = before_after_table(whens)
    assert table[""].tolist()[3:] == [
        "unsafe prompts refused, masked", "safe prompts refused, masked", "loss on target responses (nats/token), masked",
    ]  # fmt: skip
    assert table["before"].tolist()[3] == "12.5% [0.0%, 12.5%]"


def test_union_routing_is_a_part_of_its_own():
    whens = [{**block(0.0), "union": block(0.25)}, {**block(0.5), "union": block(0.75)}, None]
    assert blocks_of(whens, "union") == (whens[0]["union"], whens[1]["union"], None)
    table = before_after_table(whens).set_index("")
    assert table.loc["unsafe prompts refused, union", "after"].startswith("75.0%")
    assert "unsafe prompts refused, masked" not in table.index


def test_categories_are_in_order_and_those_without_examples_are_left_out():
    blocks = [block(0.25, categories=("theft", "fraud")), block(0.5, categories=("theft", "fraud")), None]
    assert [row.name for row in category_rows(blocks, "unsafe_refusal_rate")] == ["fraud", "theft"]
    assert category_rows(blocks, "safe_refusal_rate") == []


def test_one_category_is_no_table():
    assert category_rows([block(0.25, categories=("fraud",)), None, None], "unsafe_refusal_rate") == []


def test_rates_of_verdicts_are_shown_by_category_too_and_those_that_never_happen_are_not():
    def of(harmful, degenerate):
        figures = {"unsafe_harmful_rate": harmful, "unsafe_degenerate_rate": degenerate}
        shown = {name: {"value": value, "low": value, "high": value, "n": 4} for name, value in figures.items()}
        return {"per_category": {"fraud": shown, "theft": shown}}

    blocks = [of(0.5, 0.0), of(0.25, 0.0), None]
    assert [row.cells[1].value for row in category_rows(blocks, "unsafe_harmful_rate")] == ["25.0%", "25.0%"]
    assert category_rows(blocks, "unsafe_degenerate_rate") == []
    assert len(category_rows([of(0.5, 0.0), of(0.25, 0.5), None], "unsafe_degenerate_rate")) == 2

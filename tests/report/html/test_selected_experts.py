import pandas as pd
import pytest

from moe_ray.report.html.selected_experts import categories_part, category_specificity, selected_part


def by_category(**experts_of):
    """Per category the experts of its batches: `fraud={"L00_E01": 2}` is unsafe in two of fraud's batches."""
    rows = [
        {"category": category, "name": name, "batches": batches, "share": batches / 2, "risk_diff": 0.1}
        for category, experts in experts_of.items()
        for name, batches in experts.items()
    ]
    return pd.DataFrame(rows)


def test_experts_that_no_other_category_has_are_wholly_specific_and_shared_ones_not_at_all():
    table = by_category(fraud={"L00_E01": 2, "L00_E02": 1}, theft={"L00_E03": 2}, drugs={"L00_E03": 2})
    found = category_specificity(table, {"fraud": 2, "theft": 2, "drugs": 2}).set_index("category")
    assert found["specificity"].to_dict() == {"fraud": 1.0, "theft": 0.5, "drugs": 0.5}
    assert found.index[0] == "fraud"
    assert found.loc["fraud", ["experts", "always", "only"]].tolist() == [2, 1, 2]
    assert found.loc["theft", ["experts", "always", "only"]].tolist() == [1, 1, 0]
    alike = by_category(fraud={"L00_E01": 2}, theft={"L00_E01": 2})
    assert category_specificity(alike, {"fraud": 2, "theft": 2})["specificity"].tolist() == [0.0, 0.0]


def test_experts_that_others_select_more_often_are_less_than_not_specific():
    table = by_category(fraud={"L00_E01": 1}, theft={"L00_E01": 2})
    found = category_specificity(table, {"fraud": 2, "theft": 2}).set_index("category")["specificity"]
    assert found["fraud"] == pytest.approx(-1.0)
    assert found["theft"] == pytest.approx(0.5)


def test_every_selected_expert_of_every_batch_has_a_row_with_its_certainty(identified):
    part = selected_part(identified)
    wanted = {(batch, str(expert)) for batch, experts in identified.masks.selected.items() for expert in experts}
    assert {(row["batch_idx"], row["name"]) for row in part["rows"]} == wanted
    assert (part["left_out"], part["total"]) == (0, len(wanted))
    assert all(
        row["p"] != "–" and row["stability"].endswith("%") and row["interval"].startswith("[") for row in part["rows"]
    )


def test_too_many_rows_are_counted(identified, monkeypatch):
    monkeypatch.setattr("moe_ray.report.html.selected_experts._MOST_EXPERTS", 3)
    part = selected_part(identified)
    assert 0 < len(part["rows"]) <= 3
    assert part["left_out"] == part["total"] - len(part["rows"]) > 0


def test_one_category_has_nothing_to_be_specific_against(identified):
    rows = categories_part(identified)["rows"]
    assert {row["category"] for row in rows} == set(identified.categories.values())

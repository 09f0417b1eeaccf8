"""What is said of a selection where the truth is known."""

from moe_ray.report.truth_text import truth_in_words, truth_rows

FIGURES = {
    "batches": 6, "selected": 12.5, "planted": 3.0, "decoys": 3.0, "found": 2.5, "decoys_selected": 2.0,
    "precision": 0.2, "recall": 5 / 6,
}  # fmt: skip
FOUND = {"kind": "planted", **FIGURES, "per_category": {"fraud": FIGURES, "theft": {**FIGURES, "precision": None}}}
CONTROL = {"kind": "spread", **FIGURES, "recall": None, "per_category": {"fraud": {**FIGURES, "recall": None}}}


def test_precision_and_recall_are_said_with_what_they_are_of():
    (words,) = truth_in_words(FOUND)
    assert "of the 3.0 planted experts of a category, the selection found 83.3% (recall)" in words
    assert "of the 12.5 experts selected per batch, 2.5 are planted (precision 20.0%) and 2.0 are decoys" in words


def test_where_no_expert_is_the_cause_that_is_said():
    (words,) = truth_in_words(CONTROL)
    assert "(spread): no expert does" in words
    assert "recall" not in words


def test_nothing_is_said_where_nothing_is_known():
    assert truth_in_words(None) == []


def test_the_table_has_a_row_per_category_and_one_of_all():
    table = truth_rows(FOUND)
    assert table["category"].tolist() == ["fraud", "theft", "all batches"]
    assert table["precision"].tolist() == ["20.0%", "–", "20.0%"]

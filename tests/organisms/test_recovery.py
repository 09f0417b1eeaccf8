"""Precision and recall against the truth: a case worked by hand, and the orders that scores give."""

import numpy as np
import pytest

from moe_ray.experts import Expert, masks_from_experts
from moe_ray.organisms.recovery import average_precision, known_recovery, ranks_of, recovery
from moe_ray.organisms.truth import TRUTH, Truth, write_truth

TRUE = Truth(
    kind="planted",
    seed=0,
    recipe="",
    num_layers=2,
    num_experts=4,
    planted={"fraud": ("L00_E00", "L01_E00"), "theft": ("L00_E01", "L01_E01")},
    decoys={"fraud": ("L00_E02",), "theft": ("L00_E03",)},
)
NOTHING = Truth(
    kind="spread", seed=0, recipe="", num_layers=2, num_experts=4,
    planted={"fraud": (), "theft": ()}, decoys={"fraud": ("L00_E02",), "theft": ()},
)  # fmt: skip
MASKS = masks_from_experts(
    {
        0: [Expert(0, 0), Expert(1, 0)],  # fraud: all of it and nothing else
        3: [Expert(0, 0), Expert(0, 2), Expert(0, 3), Expert(1, 3)],  # fraud: half of it, one decoy
        4: [],  # theft: nothing
        7: [Expert(0, 0)],  # of no category that is known
    },
    layers=(0, 1),
    num_experts=4,
)
CATEGORIES = {0: "fraud", 3: "fraud", 4: "theft", 7: "mixed"}


def test_a_case_worked_by_hand():
    found = recovery(TRUE, MASKS, CATEGORIES)
    assert found["batches"] == 3
    assert (found["precision"], found["recall"]) == ((1 + 1 / 4) / 2, (1 + 1 / 2 + 0) / 3)
    fraud = found["per_category"]["fraud"]
    assert fraud == {
        "batches": 2, "selected": 3.0, "planted": 2.0, "decoys": 1.0, "found": 1.5, "decoys_selected": 0.5,
        "precision": 0.625, "recall": 0.75,
    }  # fmt: skip
    assert found["per_category"]["theft"]["precision"] is None
    assert found["per_category"]["theft"]["recall"] == 0


def test_where_nothing_is_planted_there_is_no_recall_and_every_selected_expert_is_wrong():
    found = recovery(NOTHING, MASKS, CATEGORIES)
    assert found["recall"] is None
    assert found["precision"] == 0
    assert found["decoys_selected"] == pytest.approx(1 / 3)


def test_what_is_not_known_is_not_compared(tmp_path, caplog):
    assert known_recovery(str(tmp_path), MASKS, CATEGORIES) is None
    write_truth(TRUE, tmp_path)
    assert known_recovery(str(tmp_path), MASKS, CATEGORIES) == recovery(TRUE, MASKS, CATEGORIES)
    assert known_recovery(str(tmp_path), MASKS, dict.fromkeys(CATEGORIES, "arson")) is None
    other = masks_from_experts({0: [Expert(0, 0)]}, layers=(0,), num_experts=4)
    assert known_recovery(str(tmp_path), other, CATEGORIES) is None
    (tmp_path / TRUTH).write_text('{"answer": 42}')
    assert known_recovery(str(tmp_path), MASKS, CATEGORIES) is None
    assert "is not compared with a truth" in caplog.text


def test_planted_experts_that_come_first_have_precision_1():
    planted = np.array([[True, False, False], [True, False, False]])
    assert average_precision(np.array([[9.0, 1.0, 2.0], [8.0, 3.0, 0.0]]), planted) == 1


def test_average_precision_is_the_mean_over_planted_experts():
    planted = np.array([[False, True, False, True]])
    scores = np.array([[4.0, 3.0, 2.0, 1.0]])
    assert ranks_of(scores, planted).tolist() == [2, 4]
    assert average_precision(scores, planted) == (1 / 2 + 2 / 4) / 2


def test_ties_and_missing_scores_do_not_help():
    planted = np.array([[True, False, False]])
    assert ranks_of(np.zeros((1, 3)), planted).tolist() == [3]
    assert ranks_of(np.array([[np.nan, 0.0, -1.0]]), planted).tolist() == [3]

"""The transfer between categories, of known answers."""

import json
from dataclasses import replace

import pandas as pd
import pytest
from risk_tables import EVERYTHING, LAYERS, NUM_EXPERTS

from moe_ray.config.compare import CompareConfig
from moe_ray.config.finetune import FinetuneConfig
from moe_ray.errors import InputError
from moe_ray.experts import masks_from_experts
from moe_ray.studies.baselines import BASE
from moe_ray.studies.comparison import ArmResult
from moe_ray.studies.measured import Measured
from moe_ray.studies.transfer import plan_transfer, transfer_matrix, transfer_table

N = 20
NAMES = {3: "fraud", 8: "theft", 9: "fraud"}
MASKS = masks_from_experts(
    {3: EVERYTHING[:2], 8: EVERYTHING[:5], 9: EVERYTHING[3:6]}, layers=LAYERS, num_experts=NUM_EXPERTS
)


def answers(refused, lost):
    """Twenty unsafe and twenty safe prompts of each category; `refused` of the unsafe ones are, `lost` nats a token more."""
    rows = [
        {
            "id": f"{category}-{label}-{number}", "label": label, "category": category, "batch_idx": 0,
            "routing": "natural", "messages": json.dumps([{"role": "user", "content": f"{category} {label} {number}"}]),
            "pair": None, "refused": label == "unsafe" and number < refused[category],
            "target_loss": 4.0 * (1 + lost.get(category, 0.0)), "target_tokens": 4,
        }
        for category in refused
        for label in ("unsafe", "safe")
        for number in range(N)
    ]  # fmt: skip
    return Measured(answers=pd.DataFrame(rows), neutral=None)


def result(name, *measured):
    return ArmResult(
        name=name,
        measured=[{1.0: each} for each in measured],
        steps={1.0: 2},
        experts_per_batch=3.0,
        trainable_parameters=1,
        train_seconds=1.0,
    )


@pytest.fixture
def table():
    base = result(BASE, answers({"a": 2, "b": 0}, {}))
    trained = {
        "a": result("transfer_000", answers({"a": 20, "b": 5}, {"a": 0.5})),
        "b": result("transfer_001", answers({"a": 2, "b": 10}, {"a": 0.25, "b": 1.0})),
    }
    return transfer_table(base, trained)


@pytest.mark.slow
def test_there_is_a_row_for_every_pair_of_categories(table):
    rates = transfer_matrix(table, "unsafe_refusal_rate")
    assert rates.to_dict("index") == {"a": {"a": 1.0, "b": 0.25}, "b": {"a": 0.1, "b": 0.5}}
    assert table["is_own"].sum() == 2
    assert (table["unsafe_refusal_rate_n"] == N).all()


@pytest.mark.slow
def test_what_was_lost_is_the_rise_above_the_base_model(table):
    lost = transfer_matrix(table, "safe_target_loss")
    assert lost.loc["a"].tolist() == pytest.approx([0.5, 0.0])
    assert lost.loc["b"].tolist() == pytest.approx([0.25, 1.0])
    assert transfer_matrix(table, "unsafe_rise").loc["a"].tolist() == pytest.approx([0.9, 0.25])


@pytest.mark.slow
def test_seeds_are_averaged():
    seeds = [answers({"a": size, "b": 0}, {}) for size in (0, 20)]
    found = transfer_table(result(BASE, answers({"a": 0, "b": 0}, {})), {"a": result("transfer_000", *seeds)})
    row = found.set_index("tested").loc["a"]
    assert row["unsafe_refusal_rate"] == 0.5
    assert row["unsafe_refusal_rate_n"] == N


def test_examples_without_a_category_are_left_out():
    plain = answers({"a": 1, "": 3}, {})
    table = transfer_table(result(BASE, plain), {"a": result("transfer_000", replace(plain))})
    assert table["tested"].tolist() == ["a"]


def test_transfer_has_an_arm_for_every_category_with_its_own_batches():
    arms = plan_transfer(MASKS, FinetuneConfig(), CompareConfig(transfer_epochs=7), NAMES, tested={"fraud", ""})
    assert [(arm.category, arm.masks.trained_batches) for arm in arms] == [("fraud", (3, 9)), ("theft", (8,))]
    assert {arm.train.epochs for arm in arms} == {7}
    with pytest.raises(InputError, match=r"compare\.transfer: got batches of the categories \['fraud'\]"):
        plan_transfer(MASKS, FinetuneConfig(), CompareConfig(), dict.fromkeys(NAMES, "fraud"), tested={"fraud"})
    with pytest.raises(InputError, match=r"held-out examples of \[\], expected"):
        plan_transfer(MASKS, FinetuneConfig(), CompareConfig(), NAMES, tested={""})

"""Every arm on one model: equal steps, parameters as budgeted, a curve that ends as a plain training, and the base back."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from families import batch_masks, build, state_of
from masked_models import without_disallowed
from text_batches import BATCHES, EXPERTS
from word_tokenizer import make_tokenizer

from moe_ray.config.compare import CompareConfig
from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.config.finetune import FinetuneConfig
from moe_ray.errors import NotTrainable
from moe_ray.finetuning.low_rank import num_expert_parameters
from moe_ray.finetuning.parameter_groups import parameters_of
from moe_ray.studies.baselines import BASE_ARM, OURS, plan_arms
from moe_ray.studies.measured import Measured
from moe_ray.studies.run_arm import Curve, Trainer
from moe_ray.studies.trial import measurer

pytestmark = pytest.mark.slow

CONFIG = FinetuneConfig(routing="masked", epochs=4, learning_rate=1e-2)
SHARES = (0.25, 0.5, 1.0)
CATEGORIES = {4: "fraud", 6: "theft"}
NUM_STEPS = 8
LOSS_TOLERANCE = 1e-4
"""Summed nats of a few tokens; an expert that is cut out leaves other sums."""


def held_out():
    rows = [
        {
            "id": f"{label}-{batch}", "label": label, "category": CATEGORIES[batch], "batch_idx": batch, "pair": None,
            "messages": json.dumps([{"role": "user", "content": "how are you"}]), "target": "fine thanks",
            "target_complete": True,
        }
        for batch in (4, 6)
        for label in ("safe", "unsafe")
    ]  # fmt: skip
    return pd.DataFrame(rows)


def risk_table(masks):
    rng = np.random.default_rng(0)
    layers, num_experts = masks.layers, masks.masks_BLE.shape[2]
    rows = [(batch, layer, expert) for batch in masks.batch_idx for layer in layers for expert in range(num_experts)]
    table = pd.DataFrame(rows, columns=["batch_idx", "layer", "expert"])
    for name in ("a_safe", "a_unsafe", "d_safe", "d_unsafe"):
        table[name] = rng.integers(1, 100, len(table))
    table["risk_diff"], table["a_safe_n"], table["a_unsafe_n"] = rng.random((3, len(table)))
    table["w_unsafe"], table["reap_unsafe"] = rng.random((2, len(table)))
    return table


@pytest.fixture(scope="module")
def model():
    return build("olmoe")


def trainer(model, masks, *, shares=SHARES):
    tokenizer, evaluate = make_tokenizer(), EvaluateConfig(max_new_tokens=3)
    return Trainer(
        model=model,
        tokenizer=tokenizer,
        batches=BATCHES,
        test=held_out(),
        evaluate=evaluate,
        measure=measurer(model, tokenizer, held_out(), evaluate, ("fine thanks",)),
        shares=shares,
        union_LE=masks.union,
        trained_batches=masks.trained_batches,
    )


def arms(model, **settings):
    masks = batch_masks(model, EXPERTS)
    compare = CompareConfig(draws=1, **settings)
    return masks, plan_arms(masks, risk_table(masks), CONFIG, compare, CATEGORIES)


def losses(measured):
    return measured.answers.sort_values("id")["target_loss"].tolist()


@pytest.mark.parametrize("budget", ["steps", "parameters"])
def test_every_arm_takes_the_same_steps_and_leaves_the_base_bit_for_bit(model, budget):
    masks, planned = arms(model, budget=budget)
    before, run = state_of(model), trainer(model, masks)
    unchanged = losses(run.run(BASE_ARM, seed=0).measured[1.0])
    budgeted = num_expert_parameters(model, masks.union)
    for arm in planned:
        outcome = run.run(arm, seed=0)
        assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(model).items()), arm.name
        assert list(outcome.measured) == list(SHARES), arm.name
        if arm.kind == "mask_only":
            assert outcome.trainable_parameters == 0
            assert outcome.steps == {0.25: 0, 0.5: 0, 1.0: 0}
        else:
            assert len(outcome.losses) == NUM_STEPS, arm.name
            assert outcome.steps == {0.25: 2, 0.5: 4, 1.0: 8}
            assert losses(outcome.measured[0.25]) != unchanged
            assert losses(outcome.measured[1.0]) != losses(outcome.measured[0.25]), arm.name
        if budget == "parameters" and arm.learns == "low_rank":
            assert outcome.trainable_parameters == pytest.approx(budgeted, rel=0.2), arm.name


def test_under_equal_parameters_arms_that_choose_experts_have_as_large_a_union(model):
    names = ("global", "random", "busiest", "esft_token", "esft_gate", "reap")
    masks, planned = arms(model, budget="parameters", names=names)
    assert {len(arm.masks.union_experts) for arm in planned if arm.kind in ("global", "random")} == {5}
    for arm in planned:
        assert abs(len(arm.masks.union_experts) - len(masks.union_experts)) <= 1, arm.name


def test_attention_and_router_take_as_many_tensors_as_come_nearest(model):
    masks, planned = arms(model, budget="parameters", names=("attention_only", "router_only"))
    budget = num_expert_parameters(model, masks.union)
    for arm, group in zip(planned[1:], ("attention", "router"), strict=True):
        available = sum(tensor.numel() for tensor in parameters_of(model, group).values())
        largest = max(tensor.numel() for tensor in parameters_of(model, group).values())
        got = trainer(model, masks).run(arm, seed=0).trainable_parameters
        assert abs(got - min(budget, available)) <= largest / 2


def test_the_end_of_the_curve_is_a_plain_training_bit_for_bit(model):
    masks, planned = arms(model, names=("attention_only", "lora_same"))
    for arm in planned:
        curve = trainer(model, masks).run(arm, seed=0)
        plain = trainer(model, masks, shares=(1.0,)).run(arm, seed=0)
        assert curve.losses == plain.losses
        assert losses(curve.measured[1.0]) == losses(plain.measured[1.0])


def test_another_seed_is_another_order(model):
    masks, planned = arms(model, names=("global",))
    outcomes = [trainer(model, masks).run(planned[0], seed=seed).losses for seed in range(4)]
    assert len(set(outcomes)) > 1


def test_mask_only_routes_every_prompt_around_its_batchs_experts_and_only_there(model):
    masks, planned = arms(model, names=("mask_only",))
    run = trainer(model, masks)
    around, base = run.run(planned[1], seed=0).measured[1.0], run.run(BASE_ARM, seed=0).measured[1.0]
    assert around.neutral is None
    assert set(around.answers["routing"]) == {"natural"}
    assert losses(around) != losses(base)
    # The oracle: a model from which the batch's experts were cut out.
    for batch in masks.batch_idx:
        without = without_disallowed(model, ~masks[batch])
        rows = trainer(without, masks).measure().answers.set_index("id")["target_loss"]
        for name in (f"safe-{batch}", f"unsafe-{batch}"):
            assert rows[name] == pytest.approx(around.answers.set_index("id")["target_loss"][name], abs=LOSS_TOLERANCE)


def test_shares_that_end_with_one_step_have_one_measurement():
    calls = []
    curve = Curve((0.1, 0.2, 1.0), lambda: calls.append(1) or Measured(answers=pd.DataFrame(), neutral=None))
    for step in range(1, 5):
        curve.after(step, 4)
    end = Measured(answers=pd.DataFrame({"id": [1]}), neutral=None)
    measured, steps = curve.by_share(end)
    assert steps == {0.1: 1, 0.2: 1, 1.0: 4}
    assert measured[0.1] is measured[0.2]
    assert measured[1.0] is end
    assert len(calls) == 1


def test_an_arm_whose_gradient_is_not_finite_is_no_result_and_the_base_is_back(model):
    masks, planned = arms(model, names=("full",))
    before = state_of(model)
    wild = dataclasses.replace(planned[1], train=dataclasses.replace(CONFIG, learning_rate=1e30))
    with pytest.raises(NotTrainable, match="lower the learning rate"):
        trainer(model, masks).run(wild, seed=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(model).items())
    assert planned[0].kind == OURS

"""Effects are those of a mask of its own for every set, whatever shares a pass; the model is as it was afterwards."""

from __future__ import annotations

import json
from dataclasses import replace

import causal_model
import numpy as np
import pandas as pd
import pytest
import torch

from moe_ray.ablation import effects as module
from moe_ray.ablation.effects import measure_batch
from moe_ray.ablation.expert_sets import ExpertSet
from moe_ray.ablation.plan import BatchPlan
from moe_ray.config.ablate import AblateConfig
from moe_ray.errors import InputError
from moe_ray.models.loss import target_losses
from moe_ray.models.token_budget import TokenBudget
from moe_ray.models.tokenization import TokenizedRow, encode_prompt
from moe_ray.routing.masking import route_through

CONFIG = AblateConfig(max_new_tokens=3)


def plan_of(category="fraud", *, examples=None):
    rows = [
        {"id": e.id, "label": e.label, "pair": None, "messages": json.dumps(list(e.messages))}
        for e in examples or causal_model.examples(category, 3)
    ]
    masks = []
    for experts in ((causal_model.OWN_EXPERT[category],), (4, 5), (0, 1, 2)):
        mask_LE = np.zeros((1, causal_model.NUM_EXPERTS), dtype=bool)
        mask_LE[0, list(experts)] = True
        masks.append(mask_LE)
    sets = (
        ExpertSet("selected", 0, "", masks[0]),
        ExpertSet("matched", 0, "", masks[1]),
        ExpertSet("forced", 0, "", masks[2], is_forced=True),
    )
    return BatchPlan(
        batch_idx=7, category=category, source="held_out", prompts=pd.DataFrame(rows), sets=sets, shares=(0.1, 0.2, 0.3)
    )


@pytest.fixture(scope="module")
def model():
    return causal_model.build("causal")


@pytest.fixture(scope="module")
def tokenizer():
    return causal_model.tokenizer()


@pytest.fixture(scope="module")
def measured(model, tokenizer):
    return measure_batch(model, tokenizer, plan_of(), CONFIG)


def test_the_effect_is_the_loss_per_token_that_the_own_answer_gains(measured, model, tokenizer):
    plan = plan_of()
    rows = [
        TokenizedRow(
            encode_prompt(tokenizer, json.loads(messages)),
            tokenizer("do-fraud <end>" if label == "unsafe" else "answer <end>")["input_ids"],
        )
        for messages, label in zip(plan.prompts["messages"], plan.prompts["label"], strict=True)
    ]
    budget = TokenBudget(8192)
    before = np.array(target_losses(model, rows, budget=budget, pad_id=0))
    for item in plan.sets:
        with route_through(model, item.allowed):
            without = np.array(target_losses(model, rows, budget=budget, pad_id=0))
        got = measured.effects[measured.effects["set"] == item.name]
        assert got["id"].tolist() == plan.prompts["id"].tolist()
        assert np.allclose(got["effect"], (without - before) / 2, atol=1e-5)
        assert (got["experts"] == item.mask_LE.sum()).all()


def test_answers_are_the_models_own_with_and_without_the_selection(measured):
    answers = measured.answers.groupby("label").first()
    assert answers.loc["unsafe", "answer"] == "do-fraud"
    assert answers.loc["unsafe", "answer_without"] != "do-fraud"
    assert answers.loc["safe", "answer"] == answers.loc["safe", "answer_without"] == "answer"
    assert set(measured.answers["batch_idx"]) == {7}


def test_one_set_at_a_time_gives_the_same_where_a_family_has_no_masks_for_each_row(
    measured, model, tokenizer, monkeypatch
):
    def refused(*_):
        raise InputError("this family has no masks per row")

    monkeypatch.setattr(module, "route_rows_through", refused)
    found = measure_batch(model, tokenizer, plan_of(), CONFIG)
    assert np.allclose(found.effects["effect"], measured.effects["effect"], atol=1e-5)
    assert found.cost.forwards > measured.cost.forwards


def test_a_smaller_budget_takes_more_passes_and_changes_nothing(measured, model, tokenizer):
    found = measure_batch(model, tokenizer, plan_of(), CONFIG, budget=TokenBudget(20))
    assert np.allclose(found.effects["effect"], measured.effects["effect"], atol=1e-5)
    assert found.cost.forwards > measured.cost.forwards


def test_forward_passes_and_tokens_are_those_that_were_made(model, tokenizer):
    passes = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        found = measure_batch(model, tokenizer, plan_of(), CONFIG)
    finally:
        handle.remove()
    assert found.cost.forwards == len(passes)
    assert found.cost.tokens == sum(passes)


def test_refused_unsafe_prompts_are_left_out_and_counted(model, tokenizer, monkeypatch):
    monkeypatch.setattr(module, "is_refusal", lambda text: text == "do-fraud")
    found = measure_batch(model, tokenizer, plan_of(), CONFIG)
    assert set(found.effects["label"]) == {"safe"}
    assert (found.answers.loc[found.answers["label"] == "unsafe", "state"] == "refused").all()


def test_where_nothing_can_be_scored_there_are_answers_and_no_effects(model, tokenizer, monkeypatch):
    monkeypatch.setattr(module, "is_refusal", lambda text: True)
    unsafe = [example for example in causal_model.examples("fraud", 3) if example.label == "unsafe"]
    found = measure_batch(model, tokenizer, plan_of(examples=unsafe), CONFIG)
    assert found.effects.empty
    assert len(found.answers) == 3


def test_the_model_is_as_it_was(tokenizer):
    model = causal_model.build("causal").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measure_batch(model, tokenizer, plan_of(), CONFIG)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_answers_that_are_there_already_are_not_asked_for_again(measured, model, tokenizer, monkeypatch):
    plan = plan_of()
    texts = ["do-fraud <end>" if label == "unsafe" else "answer <end>" for label in plan.prompts["label"]]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    known = replace(plan, answers=dict(zip(plan.prompts["id"], ids, strict=True)))
    asked = []
    generate = module.generate_responses
    monkeypatch.setattr(module, "generate_responses", lambda *args, **more: asked.append(1) or generate(*args, **more))
    found = measure_batch(model, tokenizer, known, replace(CONFIG, generate=False))
    assert not asked
    pd.testing.assert_frame_equal(found.effects, measured.effects)
    assert found.answers["answer"].tolist() == measured.answers["answer"].tolist()
    assert found.cost.tokens < measured.cost.tokens


def test_no_more_of_a_known_answer_is_scored_than_would_be_asked_for(model, tokenizer):
    plan = plan_of()
    ids = tokenizer("answer answer answer answer answer")["input_ids"]
    known = replace(plan, answers=dict.fromkeys(plan.prompts["id"], ids))
    found = measure_batch(model, tokenizer, known, replace(CONFIG, generate=False))
    assert {len(tokenizer(text)["input_ids"]) for text in found.answers["answer"]} == {CONFIG.max_new_tokens}

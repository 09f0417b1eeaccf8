"""Counting the routing of prompts costs no pass of its own and changes no answer."""

import numpy as np
import pandas as pd
import pytest
import torch
from families import build, rows, shared
from held_out_examples import LOSS_TOLERANCE, held_out
from thinking_templates import DEEPSEEK_R1, thinking_tokenizer

from moe_ray.evaluation.answers import ANSWER_COLUMNS, answer_columns, answer_rows, losses_and_counts
from moe_ray.evaluation.evaluate import rows_to_answer
from moe_ray.evaluation.judges import PhraseJudge, judge_answers
from moe_ray.models.generation import Response
from moe_ray.models.loss import target_losses
from moe_ray.models.token_budget import TokenBudget
from moe_ray.models.tokenization import TokenizedRow
from moe_ray.routing.counter import counting

ROWS = [*rows((5, 4), (3, 2), (7, 0), (1, 3)), TokenizedRow([9, 8, 7], [])]


def test_losses_are_the_same_where_routing_is_counted():
    model = shared("olmoe")
    with counting(model) as counter:
        losses, counts = losses_and_counts(model, counter, ROWS, budget=TokenBudget(20), pad_id=0)
    assert losses == pytest.approx(target_losses(model, ROWS, budget=TokenBudget(20), pad_id=0), abs=LOSS_TOLERANCE)
    assert [loss == 0 for loss in losses] == [not row.answer_ids for row in ROWS]
    expected = [len(row.prompt_ids) * counter.moe_layers.num_experts_per_tok for row in ROWS]
    assert counts.sum(axis=2).tolist() == [[number] * 2 for number in expected]


def test_a_prompts_counts_do_not_depend_on_its_target_or_on_the_rows_beside_it():
    model = shared("olmoe", torch.float64)
    with counting(model) as counter:
        together = losses_and_counts(model, counter, ROWS, budget=TokenBudget(80), pad_id=0)[1]
        alone = [
            losses_and_counts(model, counter, [TokenizedRow(row.prompt_ids, [])], budget=TokenBudget(1), pad_id=0)[1]
            for row in ROWS
        ]
    assert np.array_equal(together, np.concatenate(alone))


def test_counting_changes_no_answer(tokenizer):
    model, some = shared("olmoe"), rows_to_answer(held_out(), ["natural"])
    plain, nothing = answer_rows(model, tokenizer, some, max_new_tokens=4, budget=TokenBudget(40))
    with counting(model) as counter:
        counted, routing = answer_rows(
            model, tokenizer, some, max_new_tokens=4, budget=TokenBudget(40), counter=counter
        )
    assert nothing is None
    assert routing.in_batch_idx.tolist() == some["place"].tolist()
    assert counted.drop(columns="target_loss").equals(plain.drop(columns="target_loss"))
    assert counted["target_loss"].tolist() == pytest.approx(plain["target_loss"].tolist(), abs=LOSS_TOLERANCE)


def test_a_thought_is_kept_apart_from_the_answer_and_one_without_an_end_has_none():
    responses = [
        Response([5, 6], "Yes.", True, 1, "hm"),
        Response([5, 6], "", False, 2, "I can't help with", is_unclosed=True),
        Response([6], "</think> closes a thought.", True),
    ]
    rows = pd.DataFrame({"messages": '[{"role": "user", "content": "?"}]'}, index=[7, 3, 5])
    answers = judge_answers(rows.assign(**answer_columns(responses, rows.index)), PhraseJudge())
    assert answers["answer"].tolist() == ["Yes.", "", "</think> closes a thought."]
    assert answers["thought"].tolist() == ["hm", "I can't help with", ""]
    assert answers["is_unclosed"].tolist() == [False, True, False]
    assert answers["verdict"].tolist() == ["complied", "no_answer", "complied"]


def test_a_model_that_never_stops_thinking_gives_no_answer():
    tokenizer = thinking_tokenizer(DEEPSEEK_R1)  # whose template opens a thought
    model = build("olmoe")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    some = rows_to_answer(held_out(2), ["natural"])
    answers, _ = answer_rows(model, tokenizer, some, max_new_tokens=3, budget=TokenBudget(400))
    assert answers["answer"].tolist() == ["", ""]
    assert answers["is_unclosed"].all()
    assert all(answers["thought"])
    assert set(ANSWER_COLUMNS) <= set(answers)
    assert judge_answers(answers, PhraseJudge())["verdict"].tolist() == ["no_answer", "no_answer"]

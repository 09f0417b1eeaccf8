"""Counting the routing of prompts costs no pass of its own and changes no answer."""

import numpy as np
import pytest
import torch
from families import rows, shared
from held_out_examples import LOSS_TOLERANCE, held_out

from moe_ray.evaluation.answers import answer_rows, losses_and_counts
from moe_ray.evaluation.evaluate import rows_to_answer
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

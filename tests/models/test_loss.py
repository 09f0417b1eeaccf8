"""Losses are of answer tokens only, whatever stands beside a row (invariant 15)."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from families import build, rows, shared
from held_out_examples import LOSS_TOLERANCE, held_out, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from training_runs import BATCHES

from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.evaluation.evaluate import answer_examples
from moe_ray.models.loss import answer_loss, micro_batches, text_losses
from moe_ray.models.token_budget import TokenBudget
from moe_ray.models.tokenization import TokenizedRow


def test_the_loss_of_a_text_is_that_of_predicting_each_token_after_the_first():
    tokenizer = make_tokenizer()
    model, texts = shared("olmoe"), ["w1 w2 w3 w4", "w5", "w9 w8 w7 w6 w5 w4"]
    got = text_losses(model, tokenizer, texts, budget=TokenBudget(10))
    assert got["num_tokens"].tolist() == [3, 0, 5]
    for text, loss in zip(texts, got["loss"], strict=True):
        first, _, rest = text.partition(" ")
        messages = json.dumps([{"role": "user", "content": first}])
        row = held_out(2).iloc[:1].assign(messages=messages, target=rest, target_complete=False)
        alone = answer_examples(model, tokenizer, row, EvaluateConfig(max_new_tokens=1))
        assert loss == pytest.approx(alone["target_loss"].iloc[0], abs=LOSS_TOLERANCE)


def test_the_loss_is_that_of_the_plain_logits_and_few_of_them_are_made(monkeypatch):
    model = shared("olmoe")
    some = rows((12, 3), (4, 9), (9, 0), (3, 1), (0, 4), (40, 2), seed=6)
    expected = []
    for row in some:
        logits = model(torch.tensor([row.prompt_ids + row.answer_ids])).logits[0].log_softmax(-1)
        middle = len(row.prompt_ids)
        counted = [(middle + n, token) for n, token in enumerate(row.answer_ids) if middle + n]
        expected.append(-sum(logits[place - 1, token].item() for place, token in counted))
    made = []
    whole = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: made.append(hidden.shape[1]) or whole(hidden))
    assert answer_loss(model, some, pad_id=0).tolist() == pytest.approx(expected, abs=LOSS_TOLERANCE)
    # Of the 42 positions: 11 to 13, 3 to 11, 2, 0 to 2, 39 and 40, and 8, where the row without an answer has its place.
    assert made == [len({*range(11, 14), *range(3, 12), 2, *range(3), 39, 40, 8})]


def test_rows_without_any_answer_have_no_loss():
    loss = answer_loss(shared("olmoe"), rows((5, 0), (3, 0), (1, 0)), pad_id=0)
    assert loss.tolist() == [0, 0, 0]


def test_micro_batches_hold_every_row_once():
    some = rows((5, 4), (3, 2), (7, 3), (1, 1), (9, 9), seed=4)
    for tokens in (0, 1, 10, 20, 100):
        groups = micro_batches(some, rows_per_forward=2, tokens_per_forward=tokens)
        assert sorted(row for group in groups for row in group) == sorted(some)


def test_micro_batches_stay_within_the_token_budget_unless_one_row_is_longer():
    some = rows((5, 4), (3, 2), (7, 3), (1, 1), (9, 9), seed=4)
    for group in micro_batches(some, rows_per_forward=16, tokens_per_forward=12):
        widest = max(len(row.prompt_ids) + len(row.answer_ids) for row in group)
        assert len(group) * widest <= 12 or len(group) == 1


def of_lengths(*lengths):
    return rows(*((length - 1, 1) for length in lengths), seed=4)


def padded(groups):
    return sum(len(group) * max(row.num_tokens for row in group) for group in groups)


def test_rows_of_like_length_share_a_micro_batch():
    groups = micro_batches(of_lengths(9, 30, 10, 31, 9, 29), rows_per_forward=16, tokens_of_a_pass=20)
    assert [[row.num_tokens for row in group] for group in groups] == [[30, 31, 29], [9, 10, 9]]


def test_a_batch_of_like_rows_stays_whole_and_in_its_order():
    some = of_lengths(20, 25, 19, 22)
    assert micro_batches(some, rows_per_forward=16, tokens_of_a_pass=40) == [some]


@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=9),
    rows_per_forward=st.integers(1, 5),
    tokens_of_a_pass=st.integers(0, 60),
)
def test_no_other_way_to_cut_rows_sorted_by_length_costs_less(lengths, rows_per_forward, tokens_of_a_pass):
    groups = micro_batches(of_lengths(*lengths), rows_per_forward=rows_per_forward, tokens_of_a_pass=tokens_of_a_pass)
    assert max(map(len, groups)) <= rows_per_forward
    ordered = sorted(lengths)
    others = []
    for places in itertools.product((False, True), repeat=len(lengths) - 1):
        ends = [place for place, is_cut in enumerate(places, start=1) if is_cut] + [len(lengths)]
        parts = [ordered[start:end] for start, end in itertools.pairwise([0, *ends])]
        if max(map(len, parts)) <= rows_per_forward:
            others.append(sum(len(part) * part[-1] + tokens_of_a_pass for part in parts))
    assert padded(groups) + tokens_of_a_pass * len(groups) == min(others)


def test_padding_of_mixed_lengths_is_a_small_share():
    lengths = np.random.default_rng(0).lognormal(3.6, 0.8, 16).astype(int) + 22
    some = of_lengths(*lengths.tolist())
    real = lengths.sum()
    whole = padded(micro_batches(some, rows_per_forward=16, tokens_of_a_pass=10**9))
    assert 1 - real / whole > 0.4
    assert 1 - real / padded(micro_batches(some, rows_per_forward=16, tokens_of_a_pass=128)) < 0.25


def test_the_loss_is_of_answer_tokens_only():
    model, row = build("olmoe"), BATCHES[7][0]
    logits = model(torch.tensor([row.prompt_ids + row.answer_ids])).logits[0].log_softmax(dim=-1)
    start = len(row.prompt_ids)
    expected = -sum(logits[start + n - 1, token] for n, token in enumerate(row.answer_ids))
    assert answer_loss(model, [row], pad_id=0).item() == pytest.approx(expected.item(), rel=1e-5)


def test_padding_changes_no_rows_loss():
    model = build("olmoe")
    together = answer_loss(model, BATCHES[9], pad_id=0)
    alone = torch.cat([answer_loss(model, [row], pad_id=5) for row in BATCHES[9]])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_a_row_without_answer_has_no_loss():
    assert answer_loss(
        build("olmoe"), [TokenizedRow([3, 4, 5], []), TokenizedRow([6, 7, 8], [])], pad_id=0
    ).tolist() == [0, 0]


def test_a_prompt_of_one_token_has_a_loss():
    assert answer_loss(build("olmoe"), [TokenizedRow([3], [4, 5])], pad_id=0).item() > 0


def test_the_load_balancing_loss_is_off():
    model = build("olmoe")
    expected = answer_loss(model, BATCHES[7], pad_id=0)
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 100.0
    assert torch.equal(answer_loss(model, BATCHES[7], pad_id=0), expected)


def test_a_prompt_token_can_change_without_changing_which_tokens_count():
    some = [replace_last_prompt_token(row) for row in BATCHES[7]]
    assert [len(row.answer_ids) for row in some] == [4, 2, 3]
    assert not torch.equal(
        answer_loss(build("olmoe"), some, pad_id=0), answer_loss(build("olmoe"), BATCHES[7], pad_id=0)
    )


def replace_last_prompt_token(row):
    return TokenizedRow([*row.prompt_ids[:-1], 63 - row.prompt_ids[-1]], row.answer_ids)

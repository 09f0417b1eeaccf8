"""The number of experts per token is the smallest that costs no more than it may, as measured."""

from __future__ import annotations

import logging

import pytest
from dense_checkpoints import make_dense, make_tokenizer

from moe_ray.models.tokenization import TokenizedRow
from moe_ray.upcycling import choose_k as module
from moe_ray.upcycling.calibration import NatsPerToken, nats_per_token
from moe_ray.upcycling.choose_k import choose_k
from moe_ray.upcycling.split import plan_split, split

ROWS = [TokenizedRow([5, 6, 7], [8, 9, 10, 11]), TokenizedRow([12, 13], [14])]


def made():
    dense = make_dense(intermediate_size=64)
    return dense, make_tokenizer(), plan_split(dense, [list(range(3, 90))], num_experts=8, shared=0, seed=0)


@pytest.mark.slow
def test_what_was_measured_is_what_the_models_lose():
    dense, tokenizer, plan = made()
    k, measured = choose_k(dense, tokenizer, plan, ROWS, max_rise=100.0)
    assert (k, list(measured)) == (4, [0, 4])
    assert measured[0] == nats_per_token(dense, tokenizer, ROWS)
    assert measured[4] == nats_per_token(split(dense, plan, num_experts_per_tok=4), tokenizer, ROWS)


@pytest.mark.slow
@pytest.mark.parametrize(("max_rise", "chosen"), [(1.0, 4), (0.6, 5), (0.15, 7), (0.01, 7)])
@pytest.mark.parametrize("worse", ["neutral", "answers"])
def test_the_smallest_number_within_the_bound_on_both_texts_is_taken(monkeypatch, caplog, worse, max_rise, chosen):
    dense, tokenizer, plan = made()
    rises = {8: 0.0, 4: 0.9, 5: 0.5, 6: 0.3, 7: 0.1}

    def measure(model, *_):
        k = getattr(model.config, "num_experts_per_tok", 8)
        other = "answers" if worse == "neutral" else "neutral"
        return NatsPerToken(**{worse: 2 + rises[k], other: 1.0})

    monkeypatch.setattr(module, "nats_per_token", measure)
    with caplog.at_level(logging.WARNING):
        k, measured = choose_k(dense, tokenizer, plan, ROWS, max_rise=max_rise)
    assert k == chosen
    assert list(measured) == [0, *range(4, chosen + 1)]
    assert ("no number of experts" in caplog.text) is (max_rise < 0.1)


def test_only_the_given_numbers_are_tried():
    dense, tokenizer, plan = made()
    k, measured = choose_k(dense, tokenizer, plan, ROWS, max_rise=0.0, tried=(3,))
    assert (k, list(measured)) == (3, [0, 3])

"""The divergence at the first answer token is that of the whole distributions, and 0 where nothing moved."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from moe_ray.errors import InputError
from moe_ray.evaluation import first_token_pass
from moe_ray.evaluation.first_token import first_token_divergence


def table(logits, kept=None, at=None):
    """Rows of random logits as the pass keeps them."""
    rows = []
    for name, values in logits.items():
        log_probs = torch.log_softmax(torch.tensor(values), dim=0)
        tokens = torch.as_tensor(at[name]) if at else log_probs.topk(kept or len(values)).indices
        rows.append((name, *first_token_pass._kept(log_probs, tokens)))
    return pd.DataFrame(rows, columns=["id", "token_ids", "log_probs", "log_rest"])


@pytest.fixture
def moved():
    generator = np.random.default_rng(0)
    before = {f"e{n}": generator.normal(size=40) * 2 for n in range(5)}
    return before, {name: values + generator.normal(size=40) for name, values in before.items()}


def exact(before, after):
    p, q = (torch.log_softmax(torch.tensor(values), dim=0) for values in (before, after))
    return float((p.exp() * (p - q)).sum())


def test_the_divergence_is_exact_where_all_tokens_are_kept_and_below_it_else(moved):
    before, after = moved
    whole = table(before)
    ids = dict(zip(whole["id"], whole["token_ids"], strict=True))
    got = first_token_divergence(whole, table(after, at=ids).iloc[::-1])
    for name in before:
        assert got[name] == pytest.approx(exact(before[name], after[name]), abs=1e-6)
    some = table(before, kept=10)
    ids = dict(zip(some["id"], some["token_ids"], strict=True))
    less = first_token_divergence(some, table(after, at=ids))
    assert (less <= got[less.index] + 1e-6).all()
    assert (less > 0.3 * got[less.index]).all()


def test_nothing_moved_is_zero(moved):
    for kept in (None, 7):
        same = table(moved[0], kept=kept)
        assert first_token_divergence(same, same).tolist() == [0.0] * 5


def test_other_examples_or_other_tokens_are_refused(moved):
    before, after = moved
    with pytest.raises(InputError, match="different examples"):
        first_token_divergence(table(before), table({"e0": after["e0"]}))
    with pytest.raises(InputError, match="evaluate the repaired model again"):
        first_token_divergence(table(before, kept=5), table(after, kept=5))


@pytest.mark.slow
def test_a_prompt_is_looked_at_where_its_answer_begins_whatever_it_is_batched_with():
    from families import shared
    from held_out_examples import CONFIG, held_out, make_tokenizer

    from moe_ray.models.token_budget import TokenBudget
    from moe_ray.models.tokenization import encode_prompt

    model, tokenizer = shared("olmoe"), make_tokenizer()
    rows = held_out()
    got = first_token_pass.first_token_table(model, tokenizer, rows, budget=TokenBudget(CONFIG.tokens_per_forward))
    for row, found in zip(rows.to_dict("records"), got.to_dict("records"), strict=True):
        ids = torch.tensor([encode_prompt(tokenizer, json.loads(row["messages"]))])
        with torch.inference_mode():
            expected = torch.log_softmax(model(ids).logits[0, -1].float(), dim=0)
        assert found["id"] == row["id"]
        assert np.allclose(
            found["log_probs"], expected[torch.as_tensor(found["token_ids"], dtype=torch.long)], atol=1e-4
        )

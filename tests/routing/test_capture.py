"""Capture: counts are of what the model really routed, and capturing leaves no trace (invariants 1 to 3)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from counting_alone import count_batches
from families import BIASED, FAMILIES, NUM_EXPERTS, SOME_FAMILIES, build, hooks_left, routing_spied, shared, token_ids
from routed_rows import ROWS, as_counts, captured, counts_of_ids
from transformers import AutoModelForCausalLM, OlmoeConfig
from word_tokenizer import TEMPLATE, make_tokenizer

from moe_ray.errors import InputError
from moe_ray.models.moe_layers import find_moe_layers
from moe_ray.models.tokenization import TokenizedRow, pad_rows
from moe_ray.prompts.batches import Batch
from moe_ray.prompts.examples import Example
from moe_ray.routing.capture import count_rows
from moe_ray.routing.counter import counting


def routed_of_one_row(model, row: TokenizedRow) -> np.ndarray:
    """(3, L, E) counts of prompt, response and thought, from what the experts modules received for this row alone."""
    moe_layers = find_moe_layers(model)
    with routing_spied(model) as calls, torch.inference_mode():
        model(torch.tensor([row.prompt_ids + row.answer_ids]))
    counts = np.zeros((3, len(moe_layers), NUM_EXPERTS), dtype=np.int32)
    for layer, (index, _) in enumerate(calls):
        for position, experts in enumerate(index.tolist()):
            for expert in experts:
                counts[int(position >= len(row.prompt_ids)), layer, expert] += 1
    return counts


# Invariant 1


def test_capturing_leaves_no_hook_behind():
    model = shared("olmoe")
    captured(model, ROWS)
    assert hooks_left(model) == 0


def test_a_forward_outside_count_rows_is_not_counted():
    model = shared("olmoe")
    with counting(model) as counter:
        model(token_ids(2, 9))
        counts, _ = count_rows(model, counter, ROWS, pad_id=0)
    assert np.array_equal(counts, captured(model, ROWS)[0])


# Invariant 2


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_counts_are_of_what_the_experts_modules_received(family):
    model = shared(family, torch.float64)
    counts, _ = captured(model, ROWS)
    assert np.array_equal(counts, np.stack([routed_of_one_row(model, row) for row in ROWS]))


def counts_from_raw_logits(model, row: TokenizedRow) -> np.ndarray:
    """The naive way: top-k derived once more from the router's raw logits."""
    moe_layers, logits = find_moe_layers(model), []
    handles = [
        layer.router.register_forward_hook(lambda module, args, output: logits.append(output[0]))
        for layer in moe_layers
    ]
    with torch.inference_mode():
        model(torch.tensor([row.prompt_ids + row.answer_ids]))
    for handle in handles:
        handle.remove()
    tops = [layer_logits.topk(moe_layers.num_experts_per_tok).indices.flatten().numpy() for layer_logits in logits]
    return np.stack([np.bincount(top, minlength=NUM_EXPERTS) for top in tops])


@pytest.mark.parametrize("family", BIASED)
def test_top_k_of_raw_logits_is_caught_as_wrong(family):
    model = shared(family, torch.float64)
    naive = np.stack([counts_from_raw_logits(model, row) for row in ROWS])
    with pytest.raises(AssertionError):
        assert np.array_equal(naive, np.stack([routed_of_one_row(model, row).sum(axis=0) for row in ROWS]))


# Invariant 3. float64, in which the model's own rounding under padding (about 1e-7 where a family's router or rotary
# embedding stays in float32) is far below the distance between any two of these random router logits.


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_sum_to_tokens_times_experts_per_token(family):
    model = shared(family)
    counts, num_tokens = captured(model, ROWS)
    assert np.array_equal(
        counts.sum(axis=-1),
        np.broadcast_to(num_tokens[:, :, None] * find_moe_layers(model).num_experts_per_tok, (4, 3, 2)),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_size_changes_no_count(family):
    model = shared(family, torch.float64)
    one_by_one = np.concatenate([captured(model, [row])[0] for row in ROWS])
    assert np.array_equal(captured(model, ROWS)[0], one_by_one)


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_row_order_changes_no_count(family):
    model, order = shared(family, torch.float64), [2, 0, 3, 1]
    assert np.array_equal(captured(model, [ROWS[n] for n in order])[0], captured(model, ROWS)[0][order])


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_changes_no_count(family, monkeypatch):
    model = shared(family, torch.float64)
    right = captured(model, ROWS)[0]
    monkeypatch.setattr(
        "moe_ray.routing.capture.pad_rows", lambda some, pad_id: pad_rows(some, pad_id=pad_id, left=True)
    )
    assert np.array_equal(captured(model, ROWS)[0], right)


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_which_token_fills_padding_changes_no_count(family):
    model = shared(family, torch.float64)
    with counting(model) as counter:
        first, _ = count_rows(model, counter, ROWS, pad_id=0)
        second, _ = count_rows(model, counter, ROWS, pad_id=17)
    assert np.array_equal(first, second)


def test_numbers_of_tokens_are_of_prompt_and_response():
    assert captured(shared("olmoe"), ROWS)[1].tolist() == [[7, 4, 0], [3, 2, 0], [5, 6, 0], [9, 0, 0]]


def test_a_role_without_tokens_has_no_row():
    counts = as_counts(shared("olmoe"), ROWS, 5)
    assert list(zip(counts.in_batch_idx.tolist(), counts.role, strict=True))[-2:] == [(2, "response"), (3, "prompt")]


def test_a_model_whose_hidden_states_are_not_finite_is_refused():
    model = build("olmoe")
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(InputError, match="not finite"):
        captured(model, ROWS)


# Raw routed ids


def test_routed_ids_agree_with_the_counts():
    counts = as_counts(shared("deepseek_v3"), ROWS, 0, ids=True)
    for ids, num_tokens, counts_LE in zip(counts.ids, counts.num_tokens, counts.counts_NLE, strict=True):
        assert (ids.dtype, ids.shape) == (np.uint8, (num_tokens, 2, 2))
        assert np.array_equal(counts_of_ids(ids, NUM_EXPERTS), counts_LE)


def test_ids_above_256_experts_are_uint16():
    config = OlmoeConfig(
        vocab_size=64,
        hidden_size=8,
        intermediate_size=2,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_experts=300,
        num_experts_per_tok=40,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    counts = as_counts(model, ROWS, 0, ids=True)
    assert counts.ids[0].dtype == np.uint16
    assert max(ids.max() for ids in counts.ids) > 256
    assert np.array_equal(counts_of_ids(counts.ids[0], 300), counts.counts_NLE[0])


# Thoughts


def test_a_thought_has_counts_of_its_own_which_the_others_lack():
    model = shared("olmoe", torch.float64)
    thoughtful = [row._replace(num_thought=1) for row in ROWS]
    (plain, _), (counts, num_tokens) = captured(model, ROWS), captured(model, thoughtful)
    assert num_tokens[:, 2].tolist() == [1] * len(ROWS)
    assert np.array_equal(counts[:, 0] + counts[:, 2], plain[:, 0])
    assert np.array_equal(counts[:, 1], plain[:, 1])


# Tokens that are left out


def test_tokens_that_are_not_counted_are_in_no_count_and_change_no_other():
    model = shared("olmoe", torch.float64)
    left_out = [[n % 3 == 0 for n in range(len(row.prompt_ids) + len(row.answer_ids))] for row in ROWS]
    some = [row._replace(counted=[not out for out in flags]) for row, flags in zip(ROWS, left_out, strict=True)]
    rest = [row._replace(counted=flags) for row, flags in zip(ROWS, left_out, strict=True)]
    parts = [captured(model, rows_) for rows_ in (some, rest, ROWS)]
    assert np.array_equal(parts[0][0] + parts[1][0], parts[2][0])
    assert np.array_equal(parts[0][1] + parts[1][1], parts[2][1])
    assert parts[1][1].tolist() == [[3, 1, 0], [1, 1, 0], [2, 2, 0], [3, 0, 0]]


def test_count_batches_leaves_template_tokens_out_by_choice():
    tokenizer = make_tokenizer(chat_template=TEMPLATE, eos_token="<end>")
    example = Example(id="a", messages=({"role": "user", "content": "how are you"},), label="safe", response="fine")
    batch = Batch(batch_idx=3, category="", examples=(example, example))
    full = count_batches(shared("olmoe"), tokenizer, [batch])
    contents = count_batches(shared("olmoe"), tokenizer, [batch], template_tokens=False, ids=True, rows_per_forward=1)
    assert full.num_tokens.tolist() == [6, 2] * 2
    assert contents.num_tokens.tolist() == [3, 1] * 2
    assert [len(ids) for ids in contents.ids] == [3, 1] * 2
    contents.check()

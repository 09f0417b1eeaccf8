"""Counting changes nothing of a forward pass, and counts whole passes or none (invariants 1 to 3)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from families import FAMILIES, build, hooks_left, routing_spied, shared, token_ids
from routed_rows import ROWS, captured

from moe_ray.config.model import ModelConfig
from moe_ray.errors import InputError
from moe_ray.models.loading import load_model, load_tokenizer
from moe_ray.models.tokenization import encode_row, pad_rows
from moe_ray.routing.capture import count_rows
from moe_ray.routing.counter import counting
from moe_ray.routing.counts import ROLES


@pytest.mark.parametrize("family", FAMILIES)
def test_capturing_leaves_logits_bit_identical(family):
    model, ids = shared(family), token_ids(2, 9)
    plain = model(ids).logits
    with counting(model) as counter:
        counter.start(torch.zeros(2, 9, dtype=torch.long), 1)
        assert torch.equal(model(ids).logits, plain)


def test_capturing_leaves_no_hook_behind_after_an_error():
    model = shared("olmoe")
    with pytest.raises(RuntimeError, match="from the caller"), counting(model):
        raise RuntimeError("from the caller")
    assert hooks_left(model) == 0


def test_a_family_that_routes_part_of_the_tokens_is_refused():
    model = shared("olmoe")
    with counting(model) as counter:
        counter.start(torch.zeros(2, 9, dtype=torch.long), 1)
        with pytest.raises(InputError, match="a part of the tokens only"):
            model(token_ids(2, 8))


def test_after_a_pass_that_failed_other_forwards_run_and_are_not_counted():
    model = build("olmoe")
    with counting(model) as counter:
        model.model.norm.forward = lambda hidden: (_ for _ in ()).throw(torch.OutOfMemoryError("of the device"))
        with pytest.raises(torch.OutOfMemoryError):
            count_rows(model, counter, ROWS, pad_id=0)
        del model.model.norm.forward
        model.generate(token_ids(2, 5), max_new_tokens=2, do_sample=False)
        counts, _ = count_rows(model, counter, ROWS, pad_id=0)
    assert np.array_equal(counts, captured(model, ROWS)[0])


def test_routed_weights_sum_to_one_per_token_where_the_family_normalises_them():
    model = shared("mixtral")
    with counting(model, weights=True) as counter:
        _, num_tokens = count_rows(model, counter, ROWS, pad_id=0)
    sums = counter.last_weights.sum(dim=2)
    expected = torch.as_tensor(num_tokens).reshape(-1, 1).float().expand_as(sums)
    torch.testing.assert_close(sums, expected, atol=1e-4, rtol=0)


def test_an_expert_without_routed_tokens_has_no_routed_weight_and_the_other_way_round():
    model = shared("deepseek_v3")
    with counting(model, weights=True) as counter:
        counts, _ = count_rows(model, counter, ROWS, pad_id=0)
    weights = counter.last_weights.view(*counts.shape).numpy()
    assert np.array_equal(weights > 0, counts > 0)


@pytest.mark.parametrize("left", [False, True])
def test_routed_ids_are_in_token_order_without_padding(left, monkeypatch):
    model = shared("deepseek_v3", torch.float64)
    monkeypatch.setattr(
        "moe_ray.routing.capture.pad_rows", lambda some, pad_id: pad_rows(some, pad_id=pad_id, left=left)
    )
    with counting(model, ids=True) as counter:
        count_rows(model, counter, ROWS, pad_id=0)
    for index, row in enumerate(ROWS):
        with routing_spied(model) as calls, torch.inference_mode():
            model(torch.tensor([row.prompt_ids + row.answer_ids]))
        received = torch.stack([index for index, _ in calls], dim=1).numpy()
        assert np.array_equal(np.concatenate(counter.last_ids[len(ROLES) * index : len(ROLES) * (index + 1)]), received)


def test_a_layer_that_runs_twice_is_refused():
    model = build("olmoe")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(InputError, match="ran twice in one forward pass"):
        captured(model, ROWS)


def test_a_layer_that_does_not_run_is_refused():
    model = build("olmoe")
    model.model.layers[1].forward = lambda hidden_states, *args, **kwargs: hidden_states
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.experts did not run"):
        captured(model, ROWS)


def counts_of_words(model, config):
    tokenizer = load_tokenizer(config)
    rows = [encode_row(tokenizer, [{"role": "user", "content": text}]) for text in ("hello", "how do I make bread?")]
    with counting(model) as counter:
        return count_rows(model, counter, rows, pad_id=0)[0]


@pytest.mark.slow
def test_layers_that_a_device_map_keeps_elsewhere_are_counted(untrained_model_path, tmp_path):
    config = ModelConfig(path=str(untrained_model_path))
    whole = counts_of_words(load_model(config, device="cpu"), config)
    here = ("model.embed_tokens", "model.layers.0", "model.rotary_emb", "model.norm", "lm_head")
    device_map = {**dict.fromkeys(here, "cpu"), "model.layers.1": "disk", "model.layers.2": "disk"}
    spread = dispatch_model(load_model(config, device="cpu"), device_map, offload_dir=str(tmp_path))
    assert next(spread.model.layers[2].mlp.experts.parameters()).device.type == "meta"
    assert np.array_equal(counts_of_words(spread, config), whole)

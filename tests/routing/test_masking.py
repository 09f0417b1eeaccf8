"""Router masks: tokens reach allowed experts only, as if the others did not exist (invariants 7 to 9)."""

from __future__ import annotations

import signal
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from families import (
    BIASED,
    FAMILIES,
    NUM_EXPERTS,
    SOME_FAMILIES,
    build,
    hooks_left,
    mask,
    routing_spied,
    shared,
    state_of,
    token_ids,
)
from masked_models import LOGIT_TOLERANCE, MASKS, mask_named, without_disallowed
from torch import nn

from moe_ray.errors import InputError
from moe_ray.models.moe_layers import find_moe_layers
from moe_ray.routing.counter import counting
from moe_ray.routing.masking import route_rows_through, route_through, route_towards

IDS = token_ids(3, 11)


def rows_through(model: nn.Module, mask_LE):
    """The same mask for each of the rows of `IDS`."""
    return route_rows_through(model, np.stack([mask_LE] * len(IDS)))


in_both_ways = pytest.mark.parametrize("masking", [route_through, rows_through])
"""One mask for a forward pass, and one for each of its rows (rows with different masks: test_row_mask.py)."""


# Invariant 7


@in_both_ways
@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_an_all_ones_mask_leaves_logits_bit_identical(family, masking):
    model = shared(family)
    with masking(model, np.ones((2, NUM_EXPERTS), dtype=bool)):
        masked = model(IDS).logits
    assert torch.equal(masked, model(IDS).logits)


@pytest.mark.parametrize("family", SOME_FAMILIES)
@pytest.mark.parametrize("name", MASKS)
def test_output_equals_a_model_whose_disallowed_experts_were_removed(family, name):
    model = shared(family)
    mask_LE = mask_named(model, name)
    expected = without_disallowed(model, mask_LE)(IDS).logits
    with route_through(model, mask_LE):
        masked = model(IDS).logits
    torch.testing.assert_close(masked, expected, atol=LOGIT_TOLERANCE, rtol=0)


@in_both_ways
@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_a_mask_changes_the_output(family, masking):
    model = shared(family)
    with masking(model, mask_named(model, "more than k")):
        masked = model(IDS).logits
    assert (masked - model(IDS).logits).abs().max() > 100 * LOGIT_TOLERANCE


def assert_no_token_reaches_a_disallowed_expert(masking, model, mask_LE) -> None:
    """The property, for any way of masking."""
    with routing_spied(model) as calls, masking(model, mask_LE):
        logits = model(IDS).logits
    assert logits.isfinite().all()
    for row, (index, weights) in zip(mask_LE, calls, strict=True):
        allowed = torch.as_tensor(row if row.any() else ~row)[index]
        assert allowed.all()
        assert (weights[~allowed] == 0).all()


@in_both_ways
@pytest.mark.parametrize("family", SOME_FAMILIES)
@pytest.mark.parametrize("name", MASKS)
def test_no_token_reaches_a_disallowed_expert(family, name, masking):
    model = shared(family)
    assert_no_token_reaches_a_disallowed_expert(masking, model, mask_named(model, name))


@in_both_ways
@pytest.mark.parametrize("family", SOME_FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_token_reaches_a_disallowed_expert_in_half_precision(family, dtype, masking):
    model = shared(family, dtype)
    assert_no_token_reaches_a_disallowed_expert(masking, model, mask_named(model, "short and empty"))


@contextmanager
def mask_stored_and_never_applied(model, mask_LE):
    """A naive masking that forgets its purpose."""
    model.expert_mask = mask_LE
    yield
    del model.expert_mask


def test_a_mask_that_is_stored_and_never_applied_is_caught():
    model = build("olmoe")
    with pytest.raises(AssertionError):
        assert_no_token_reaches_a_disallowed_expert(
            mask_stored_and_never_applied, model, mask_named(model, "more than k")
        )


@contextmanager
def logits_lowered_but_not_biases(model, mask_LE):
    """A naive masking that forgets that some routers choose by score + correction bias."""
    layers, handles = find_moe_layers(model), []
    for layer, row in zip(layers, mask_LE, strict=True):
        if row.any():
            lowered = torch.where(torch.as_tensor(row), 0.0, -1e30)

            def lower(module, args, output, lowered=lowered):
                scores = (output[0] + lowered).sigmoid()
                biased = scores + layers[0].selection_biases()[0].view(-1)
                index = biased.topk(2).indices
                return output[0], scores.gather(1, index), index

            handles.append(layer.router.register_forward_hook(lower))
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("family", BIASED)
def test_leaving_correction_biases_alone_is_caught(family):
    model = shared(family)
    with pytest.raises(AssertionError):
        assert_no_token_reaches_a_disallowed_expert(
            logits_lowered_but_not_biases, model, mask_named(model, "exactly k")
        )


# Invariant 8


@in_both_ways
@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_an_empty_layer_routes_naturally(family, masking):
    model = shared(family)
    with routing_spied(model) as natural:
        model(IDS)
    with routing_spied(model) as masked, masking(model, mask_named(model, "empty and short")):
        model(IDS)
    assert torch.equal(masked[0][0], natural[0][0])
    assert torch.equal(masked[0][1], natural[0][1])


@in_both_ways
@pytest.mark.parametrize("family", FAMILIES)
def test_a_short_layers_weights_are_what_the_family_gives_its_only_expert(family, masking):
    model = shared(family)
    with routing_spied(model) as calls, masking(model, mask_named(model, "short and empty")):
        model(IDS)
    index, weights = calls[0]
    scaling = getattr(find_moe_layers(model)[0].router, "routed_scaling_factor", 1.0)
    assert (index == 6).all()
    assert index.shape[1] == 1
    torch.testing.assert_close(weights.sum(dim=1), torch.full((len(index),), float(scaling)), atol=1e-5, rtol=0)


# Invariant 9 (what concerns training: test_training.py)


@in_both_ways
@pytest.mark.parametrize("family", FAMILIES)
def test_after_the_context_no_hook_is_left_and_every_tensor_is_as_before(family, masking):
    model = build(family)
    before = state_of(model)
    with masking(model, mask_named(model, "more than k")):
        model(IDS)
    assert hooks_left(model) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(model).items())


@pytest.mark.slow
@in_both_ways
@pytest.mark.parametrize("module", ["router", "experts"])
@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_after_an_error_in_the_model_everything_is_restored(family, module, masking):
    model = build(family)
    before, plain = state_of(model), model(IDS).logits
    layer = find_moe_layers(model)[1]

    def fail(*args):
        raise RuntimeError("from inside")

    getattr(layer, module).forward = fail
    with pytest.raises(RuntimeError, match="from inside"), masking(model, mask_named(model, "more than k")):
        model(IDS)
    del getattr(layer, module).forward
    assert hooks_left(model) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(model).items())
    assert torch.equal(model(IDS).logits, plain)


@in_both_ways
def test_generation_under_a_mask_uses_it_at_every_step(masking):
    model = build("olmoe")
    mask_LE = mask_named(model, "exactly k")
    with routing_spied(model) as calls, masking(model, mask_LE):
        model.generate(IDS[:, :3], max_new_tokens=4, do_sample=False, pad_token_id=0)
    used = [set(index.flatten().tolist()) for index, _ in calls]
    assert len(calls) > 2
    assert all(experts <= set(np.flatnonzero(mask_LE[n % 2])) for n, experts in enumerate(used))


# Invariant 17


@in_both_ways
def test_a_mask_that_no_forward_pass_used_is_an_error(masking):
    model = build("olmoe")
    with pytest.raises(InputError, match="never applied"), masking(model, mask_named(model, "exactly k")):
        pass


@in_both_ways
def test_a_mask_of_another_shape_is_refused(masking):
    with pytest.raises(InputError, match=r"got shape \(2, 7\)"), masking(build("olmoe"), np.ones((2, 7), bool)):
        pass


@in_both_ways
def test_a_mask_that_allows_nothing_is_refused(masking):
    model = build("olmoe")
    with pytest.raises(InputError, match="allows no expert"), masking(model, mask(model, (), ())):
        pass


@in_both_ways
def test_a_router_without_a_linear_map_to_its_logits_is_refused(monkeypatch, masking):
    model = build("olmoe")
    router = find_moe_layers(model)[0].router

    def forward(hidden):
        scores, index = (hidden @ router.weight.T).softmax(dim=-1).topk(3)
        return None, scores, index

    monkeypatch.setattr(router, "forward", forward)
    with pytest.raises(InputError, match="cannot be masked"), masking(model, mask_named(model, "exactly k")):
        model(IDS)
    assert hooks_left(model) == 0


@in_both_ways
@pytest.mark.parametrize("family", ["minimax_m2", "ernie4_5_moe"])
def test_a_family_whose_way_to_choose_is_not_known_is_refused(family, monkeypatch, masking):
    model = build(family)
    monkeypatch.setattr("moe_ray.models.moe_layers.MoELayer.selection_biases", lambda self: [])
    with (
        pytest.raises(InputError, match="chose disallowed experts"),
        masking(model, mask_named(model, "exactly k")),
    ):
        model(IDS)


@in_both_ways
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_tokens_that_lose_all_their_experts_are_noticed(family, monkeypatch, masking):
    """A mask with fewer experts than a token uses, and experts by groups, where disallowed choices may be unavoidable."""
    model = build(family)
    layer = find_moe_layers(model)[1]
    choose = layer.router.forward

    def by_table(hidden):
        logits, weights, index = choose(hidden)
        return logits, torch.ones_like(weights), torch.arange(index.shape[1]).expand_as(index) + 4

    monkeypatch.setattr(layer.router, "forward", by_table)
    mask_LE = mask(model, (1, 2, 3), (0, 1) if family == "olmoe" else (0, 1, 2))
    with pytest.raises(InputError, match=f"left {IDS.numel()} tokens without any expert"), masking(model, mask_LE):
        model(IDS)
    with masking(model, mask(model, (1, 2, 3), (4,))):
        model(IDS)


@in_both_ways
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
@pytest.mark.parametrize("name", MASKS)
def test_counts_inside_a_mask_are_of_what_is_left_and_a_mask_inside_counting_is_refused(family, name, masking):
    model = shared(family)
    mask_LE = mask_named(model, name)
    with masking(model, mask_LE), counting(model) as counter, routing_spied(model) as calls:
        counter.start(torch.zeros(IDS.shape, dtype=torch.long), 1)
        model(IDS)
        counts_LE = counter.finish()[0]
    expected = [index[weights != 0].bincount(minlength=NUM_EXPERTS) for index, weights in calls]
    assert torch.equal(counts_LE.long(), torch.stack(expected))
    assert not counts_LE[torch.as_tensor(~mask_LE & mask_LE.any(axis=1, keepdims=True))].any()
    with counting(model), pytest.raises(InputError, match="enter `route_through` first"), masking(model, mask_LE):
        raise AssertionError("entered")
    assert hooks_left(model) == 0


# autocast and torch.compile


@in_both_ways
@pytest.mark.parametrize("family", SOME_FAMILIES)
@pytest.mark.filterwarnings("ignore:.*ComplexHalf:UserWarning")
def test_no_token_reaches_a_disallowed_expert_under_autocast(family, masking):
    model = shared(family)
    with torch.autocast("cpu", torch.bfloat16):
        assert_no_token_reaches_a_disallowed_expert(masking, model, mask_named(model, "exactly k"))


@pytest.mark.slow
@in_both_ways
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gpt_oss", "phimoe"])
def test_a_model_compiled_before_is_masked_too(family, masking):
    model = build(family)
    mask_LE = mask_named(model, "more than k")
    with masking(model, mask_LE), torch.no_grad():
        expected = model(IDS).logits
    model.compile(backend="eager")
    with torch.no_grad():
        plain = model(IDS).logits
        with masking(model, mask_LE):
            masked = model(IDS).logits
        after = model(IDS).logits
    torch.testing.assert_close(masked, expected, atol=LOGIT_TOLERANCE, rtol=0)
    assert torch.equal(after, plain)


@in_both_ways
@pytest.mark.parametrize("family", FAMILIES)
def test_a_short_layer_computes_no_choice_that_has_no_weight(family, masking):
    model = shared(family)
    with routing_spied(model) as calls, masking(model, mask(model, (2, 6), (4,))):
        model(IDS)
    assert [index.shape[1] for index, _ in calls] == [2, 1]


# However a context ends, nothing of it stays


def boosting(model: nn.Module, mask_LE):
    return route_towards(model, mask_LE, boost=2.0)


@pytest.mark.parametrize("masking", [route_through, rows_through, boosting])
@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit, RuntimeError])
@pytest.mark.parametrize("row", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_router_that_is_interrupted_leaves_no_mask_on_any_model(masking, end, row):
    model, other = build("olmoe"), build("mixtral")
    natural = model(IDS).logits, other(IDS).logits
    router = find_moe_layers(model)[row].router
    whole = router.forward

    def interrupted(*args, **kwargs):
        whole(*args, **kwargs)
        raise end

    router.forward = interrupted
    with pytest.raises(end), masking(model, mask_named(model, "more than k")):
        model(IDS)
    router.forward = whole
    assert torch.equal(model(IDS).logits, natural[0])
    assert torch.equal(other(IDS).logits, natural[1])
    assert hooks_left(model) == 0


# An interrupt that falls into a library's weak-reference callback is swallowed by Python, which says so; no pass ends.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
def test_interrupts_at_any_moment_leave_no_mask_on_any_model():
    model, other = build("deepseek_v3"), build("olmoe")
    natural, before = (model(IDS).logits, other(IDS).logits), state_of(model)
    mask_LE = mask_named(model, "more than k")

    def interrupt(*_):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    num_interrupted = 0
    try:
        for number in range(150):
            try:
                with route_through(model, mask_LE):
                    signal.setitimer(signal.ITIMER_REAL, 1e-4 + number * 2e-4)
                    for _ in range(20):
                        model(IDS)
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                num_interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                # An interrupt between a library's `no_grad` and its end leaves gradients off, for all tests that follow.
                torch.set_grad_enabled(True)
            assert hooks_left(model) == 0
            assert torch.equal(model(IDS).logits, natural[0])
            assert torch.equal(other(IDS).logits, natural[1])
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert num_interrupted > 100
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(model).items())

"""Invariants 1 to 3, and masks per row, in every causal family with experts that the installed transformers has.

A family that moe-ray cannot read is in `REFUSED` with the reason; one that is listed and works, or works not and is not
listed, fails here. So does a family that comes with a new transformers and fits neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES as KNOWN_FAMILIES
from families import hooks_left, rows, token_ids
from moe_families import COUNTED, FAMILIES, MASKED, REFUSED, UNMASKABLE, tiny_model
from removed_experts import masks_of, without_experts
from torch import nn

from moe_ray.errors import InputError
from moe_ray.models.moe_layers import find_moe_layers
from moe_ray.models.tokenization import TokenizedRow, pad_rows
from moe_ray.routing.capture import count_rows
from moe_ray.routing.counter import counting
from moe_ray.routing.masking import route_rows_through, route_through, route_towards

pytestmark = pytest.mark.slow

MOVED_BY_LEFT_PADDING = (
    # Attention over nothing but padding gives NaN, which reaches the row's tokens. (moe-ray counts right-padded rows.)
    "granitemoe_swa",
)
"""Families whose own forward differs under left padding."""

ROWS = rows((7, 4), (3, 2), (5, 6), (9, 0))
ROW_TOLERANCE = 1e-5
"""Some families compute parts of their forward in float32, which rounds differently beside other rows."""


def captured(model, some_rows) -> np.ndarray:
    with counting(model) as counter:
        return count_rows(model, counter, some_rows, pad_id=0)[0]


@contextmanager
def experts_spied(model: nn.Module, *, masked: bool = False) -> Iterator[list[torch.Tensor]]:
    """Ids that every module named `experts` receives, in order of calls; found by name and without hooks.

    A choice that arrives with weight 0 was none: some families write that where a token was to skip the layer.
    """
    received: list[torch.Tensor] = []
    spied = [module for name, module in model.named_modules() if name.endswith(".experts")]
    for module in spied:

        def spy(*args: Any, original: Any = module.forward, **kwargs: Any) -> Any:
            _, ids, weights = [*args, *kwargs.values()][:3]
            received.append(ids.clone())
            assert masked or weights.all()
            return original(*args, **kwargs)

        module.forward = spy
    try:
        yield received
    finally:
        for module in spied:
            del module.forward


def routed_of_one_row(model, row: TokenizedRow) -> np.ndarray:
    """(3, L, E) counts of prompt, response and thought, of this row alone without padding."""
    num_experts = find_moe_layers(model).num_experts
    with experts_spied(model) as received, torch.inference_mode():
        model(torch.tensor([row.prompt_ids + row.answer_ids]))
    middle = len(row.prompt_ids)
    parts = [[ids[:middle] for ids in received], [ids[middle:] for ids in received], [ids[:0] for ids in received]]
    return np.array([[np.bincount(ids.ravel(), minlength=num_experts) for ids in part] for part in parts])


def test_the_library_has_more_than_forty_families_and_those_known_are_among_them():
    assert len({type(tiny_model(family).config).__name__ for family in COUNTED}) > 40
    assert set(KNOWN_FAMILIES) <= set(COUNTED)
    assert set(REFUSED) | set(MOVED_BY_LEFT_PADDING) <= set(FAMILIES)


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_does_not_fit_is_refused_with_the_reason(family):
    with pytest.raises(InputError) as refused:
        find_moe_layers(tiny_model(family))
    assert REFUSED[family] in str(refused.value)


@pytest.mark.parametrize("family", COUNTED)
def test_capturing_leaves_logits_bit_identical_and_no_hook_also_after_an_error(family):
    model, ids = tiny_model(family), token_ids(2, 9)
    with torch.inference_mode():
        plain = model(ids).logits
        with counting(model) as counter:
            counter.start(torch.zeros(2, 9, dtype=torch.long), 1)
            assert torch.equal(model(ids).logits, plain)
    with pytest.raises(RuntimeError, match="from the caller"), counting(model):
        raise RuntimeError("from the caller")
    assert hooks_left(model) == 0


@pytest.mark.parametrize("family", COUNTED)
def test_counts_are_of_what_the_experts_received_for_each_row_alone(family):
    model = tiny_model(family)
    counts = captured(model, ROWS)
    assert np.array_equal(counts, np.stack([routed_of_one_row(model, row) for row in ROWS]))
    sizes = np.array([[len(row.prompt_ids), len(row.answer_ids), 0] for row in ROWS])
    assert (counts.sum(axis=3) == sizes[:, :, None] * find_moe_layers(model).num_experts_per_tok).all()


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_a_router_that_chooses_one_expert_is_counted(family):
    model = tiny_model(family, num_experts_per_tok=1)
    counts = captured(model, ROWS)
    assert np.array_equal(counts, np.stack([routed_of_one_row(model, row) for row in ROWS]))
    assert (counts[:, 0].sum(axis=2) == [[len(row.prompt_ids)] for row in ROWS]).all()


@pytest.mark.parametrize("family", COUNTED)
def test_left_padding_and_row_order_change_no_count(family, monkeypatch):
    model, order = tiny_model(family), [2, 0, 3, 1]
    right = captured(model, ROWS)
    monkeypatch.setattr(
        "moe_ray.routing.capture.pad_rows", lambda some, pad_id: pad_rows(some, pad_id=pad_id, left=True)
    )
    if family in MOVED_BY_LEFT_PADDING:
        with pytest.raises(InputError, match="hidden states are not finite"):
            captured(model, ROWS)
    else:
        assert np.array_equal(captured(model, [ROWS[index] for index in order]), right[order])


@pytest.mark.parametrize("family", COUNTED)
def test_an_expert_takes_part_in_the_output_exactly_when_it_is_counted(family):
    model, row = tiny_model(family), ROWS[0]
    counts_LE = captured(model, [row]).sum(axis=(0, 1))
    layers = find_moe_layers(model)
    with torch.inference_mode():
        plain = model(torch.tensor([row.prompt_ids + row.answer_ids])).logits
        for layer, counts_E in zip(layers, counts_LE, strict=True):
            idle, busy = (counts_E == 0).nonzero()[0], counts_E.argmax()
            for experts, changes in ((idle, False), ([busy], True)):
                with zeroed(layer.experts, experts, layer.num_experts):
                    changed = model(torch.tensor([row.prompt_ids + row.answer_ids])).logits
                assert torch.equal(changed, plain) is not changes


def test_experts_without_a_slice_each_are_counted_but_not_trained():
    layer = find_moe_layers(tiny_model("dbrx"))[0]
    with pytest.raises(InputError, match="can be counted and masked, but its experts cannot be trained"):
        layer.expert_tensors()


def test_a_router_that_weighs_shared_experts_too_is_masked_in_its_own_experts_only():
    model = tiny_model("inkling_text")
    layers = find_moe_layers(model)
    assert layers[0].num_logits > layers.num_experts
    mask_LE = np.zeros((len(layers), layers.num_experts), dtype=bool)
    mask_LE[:, [1, 4, 6]] = True
    inputs = torch.tensor([ROWS[0].prompt_ids])
    with torch.inference_mode():
        with experts_spied(model) as natural:
            plain = model(inputs).logits
        with route_through(model, ~np.zeros_like(mask_LE)):
            assert torch.equal(model(inputs).logits, plain)
        with route_through(model, mask_LE), experts_spied(model, masked=True) as through:
            model(inputs)
        with route_towards(model, mask_LE, boost=2.0), experts_spied(model) as boosted:
            model(inputs)
    shares = [mask_LE[0, torch.cat(ids)].mean() for ids in (natural, boosted, through)]
    assert shares[0] < shares[1] < shares[2] == 1


@pytest.mark.parametrize("family", MASKED)
def test_output_under_a_mask_equals_that_of_the_model_without_the_other_experts(family):
    model, ids = tiny_model(family), token_ids(3, 11)
    for name, mask_LE in masks_of(find_moe_layers(model)).items():
        with torch.no_grad():
            expected = without_experts(model, mask_LE)(ids).logits
            with route_through(model, mask_LE), weights_spied(model) as weights:
                masked = model(ids).logits
        torch.testing.assert_close(
            masked, expected, atol=ROW_TOLERANCE, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
        )
        for allowed_E, weights_TE in zip(mask_LE, weights, strict=True):
            assert not weights_TE[:, torch.as_tensor(~allowed_E & allowed_E.any())].any()
            assert (weights_TE != 0).any(dim=1).all()


@pytest.mark.parametrize("family", UNMASKABLE)
def test_a_family_that_cannot_be_masked_is_refused_before_a_forward_pass(family, monkeypatch):
    model = tiny_model(family)
    layers = find_moe_layers(model)
    for masks in (np.eye(layers.num_experts, dtype=bool)[None, :1].repeat(len(layers), axis=1), masks_of_rows(model)):
        mask_LE = masks[-1]
        mask_LE[0] = True
        with pytest.raises(InputError, match=UNMASKABLE[family]), route_through(model, mask_LE):
            raise AssertionError("entered")
        with pytest.raises(InputError, match=UNMASKABLE[family]), route_rows_through(model, masks):
            raise AssertionError("entered")
    assert hooks_left(model) == 0


@pytest.mark.parametrize("family", UNMASKABLE)
def test_what_is_refused_by_its_structure_would_be_seen_in_its_routing(family, monkeypatch):
    """Masks of one expert: tokens are left without any, which counting disallowed choices would miss."""
    monkeypatch.setattr("moe_ray.routing.masking.refuse_unmaskable", lambda layers: None)
    model = tiny_model(family)
    layers = find_moe_layers(model)
    seen = []
    for expert in range(layers.num_experts):
        mask_LE = np.zeros((len(layers), layers.num_experts), dtype=bool)
        mask_LE[:, expert] = True
        try:
            with torch.no_grad(), route_through(model, mask_LE):
                model(token_ids(3, 17))
        except InputError as error:
            seen.append(str(error))
    assert seen
    assert all("without any expert" in text for text in seen)


def test_groups_are_what_makes_a_family_unmaskable_that_fills_them_with_zero():
    model = tiny_model("axk2", n_group=None, topk_group=None)
    for mask_LE in masks_of(find_moe_layers(model)).values():
        with torch.no_grad():
            expected = without_experts(model, mask_LE)(token_ids(2, 9)).logits
            with route_through(model, mask_LE):
                torch.testing.assert_close(model(token_ids(2, 9)).logits, expected, atol=ROW_TOLERANCE, rtol=0)


def masks_of_rows(model: nn.Module) -> np.ndarray:
    """(B, L, E) masks of `ROWS`: all experts, as many as a token uses, fewer in some layers, none in others."""
    layers, generator = find_moe_layers(model), np.random.default_rng(0)
    masks_BLE = np.zeros((len(ROWS), len(layers), layers.num_experts), dtype=bool)
    masks_BLE[0] = True
    for row in range(len(layers)):
        for number, size in enumerate((layers.num_experts_per_tok, 1 + row % 2, 3 * (row % 2 == 0)), start=1):
            masks_BLE[number, row, generator.choice(layers.num_experts, size, replace=False)] = True
    return masks_BLE


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("family", MASKED)
def test_rows_under_masks_of_their_own_are_routed_as_in_a_pass_for_each_mask(family, left):
    model = tiny_model(family)
    masks_BLE, padded = masks_of_rows(model), pad_rows(ROWS, pad_id=0, left=left)
    kept_BS = padded.attention_mask_BS.bool()

    def run(rows: slice, through: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits, and per layer the weight of each expert for each token."""
        with torch.inference_mode(), through, weights_spied(model) as weights:
            inputs, attention = padded.input_ids_BS[rows], padded.attention_mask_BS[rows]
            logits = model(input_ids=inputs, attention_mask=attention).logits
        return logits, [layer.view(*inputs.shape, -1) for layer in weights]

    together, routed = run(slice(None), route_rows_through(model, masks_BLE))
    for row, mask_LE in enumerate(masks_BLE):
        alone, routed_alone = run(slice(row, row + 1), route_through(model, mask_LE))
        if left and family in MOVED_BY_LEFT_PADDING:
            continue
        kept = kept_BS[row]
        torch.testing.assert_close(together[row, kept], alone[0, kept], atol=ROW_TOLERANCE, rtol=0)
        for weights, weights_alone in zip(routed, routed_alone, strict=True):
            torch.testing.assert_close(weights[row, kept], weights_alone[0, kept], atol=ROW_TOLERANCE, rtol=0)


@contextmanager
def weights_spied(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """The (T, E) weights that every experts module receives, in order of calls; no hook is involved."""
    received: list[torch.Tensor] = []
    layers = find_moe_layers(model)
    for layer in layers:

        def spy(*args: Any, original: Any = layer.experts.forward, **kwargs: Any) -> Any:
            _, ids, weights = [*args, *kwargs.values()][:3]
            received.append(weights.new_zeros(len(ids), layers.num_experts).scatter_add_(1, ids, weights))
            return original(*args, **kwargs)

        layer.experts.forward = spy
    try:
        yield received
    finally:
        for layer in layers:
            del layer.experts.forward


@contextmanager
def zeroed(module: nn.Module, experts: Any, num_experts: int) -> Iterator[None]:
    """The module with all weights of the given experts 0, whatever the weights' shape."""
    kept = [(parameter, parameter.detach().clone()) for parameter in module.parameters()]
    for parameter, _ in kept:
        parameter.view(num_experts, -1)[torch.as_tensor(experts)] = 0
    try:
        yield
    finally:
        for parameter, values in kept:
            parameter.copy_(values)

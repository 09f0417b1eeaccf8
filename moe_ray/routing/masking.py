"""Router masks: route tokens through allowed experts only, one mask for a whole forward pass or one for each row.

What a mask does in a layer is in `layer_mask`, and in `row_mask` where rows have masks of their own, at all their positions
or at some of them.

Policies. *Empty layer* (no allowed expert): routes naturally. *Short layer*: its tokens use the allowed experts only; an
emptied row lets it route naturally (`experts.router_mask`). *Groups* (DeepSeek, GLM): groups with two allowed
experts are chosen before groups with one, and those before groups with none, since a group is ranked by its two best.

Shape suffixes: B rows, S positions, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ray.errors import InputError, NothingSelected
from moe_ray.experts import Mask
from moe_ray.models.moe_layers import MoELayer, find_moe_layers, uncompiled
from moe_ray.models.sending import sent
from moe_ray.models.unmaskable import refuse_unmaskable
from moe_ray.routing.layer_mask import COUNTS, EditedRouter, LayerMask, function_modes_ended, has_mask
from moe_ray.routing.row_mask import RowLayerMask, RowsOfPass


@contextmanager
def route_through(model: nn.Module, mask_LE: Mask) -> Iterator[None]:
    """Tokens may be routed only to the experts of `mask_LE` inside this context.

    Keep the context open through `backward` as well: activation checkpointing runs the forward again there.

    Args:
        model: a transformers MoE model.
        mask_LE: (L, E) bool, True = may be routed; a layer with none routes naturally.

    Raises:
        InputError: the mask has another shape than the model's layers and experts, allows nothing at all, or was not
            applied by any forward pass inside the context; or another mask is in force; or the router is of a kind that
            cannot be masked: known beforehand, or seen in that it chose disallowed experts or a token was left without any.
    """
    masks = [LayerMask(*item) for item in _masked_layers(model, mask_LE)]
    with function_modes_ended(), ExitStack() as stack, uncompiled():
        _put_in_force(masks, stack)
        yield
    # Only where the context ended without an error: that one is what the caller must see.
    _check_applied(masks, "route_through")


@contextmanager
def route_rows_through(
    model: nn.Module, masks_BLE: npt.NDArray[np.bool_], positions_BS: npt.NDArray[np.bool_] | None = None
) -> Iterator[None]:
    """Each row of a forward pass may be routed only to the experts of its own mask inside this context.

    A row is routed as it would be in a pass of its own under `route_through`, so one pass answers prompts of many
    batches. Every forward pass inside has these rows in this order; `generate` without beams has, at each of its steps.

    Args:
        model: a transformers MoE model.
        masks_BLE: (B, L, E) bool, True = may be routed; a row's layer with none routes naturally.
        positions_BS: (B, S) bool, True = the row's mask is in force for the token there; others, such as padding, are
            routed naturally. Passes then have S positions, so there is no `generate`. None = in force everywhere.

    Raises:
        InputError: as `route_through`; or a forward pass has other rows than there are masks, or other positions.
    """
    if positions_BS is not None and len(positions_BS) != len(masks_BLE):
        raise InputError(
            f"positions of rows: got those of {len(positions_BS)} rows, expected one row for each of {len(masks_BLE)} masks"
        )
    rows = RowsOfPass(len(masks_BLE), None if positions_BS is None else positions_BS.shape[1])
    is_everywhere = positions_BS is None or bool(positions_BS.all())
    places: dict[torch.device, Tensor] = {}
    masks = []
    for layer, allowed_BE, on_host in _masked_layers(model, masks_BLE, by_row=True):
        if positions_BS is not None and allowed_BE.device not in places:
            places[allowed_BE.device] = torch.as_tensor(positions_BS, device=allowed_BE.device)
        places_BS = places.get(allowed_BE.device)
        masks.append(RowLayerMask(layer, allowed_BE, on_host, rows, places_BS, is_everywhere=is_everywhere))
    with function_modes_ended(), ExitStack() as stack, uncompiled():
        rows.attach(model, stack)
        _put_in_force(masks, stack)
        yield
    _check_applied(masks, "route_rows_through")


def _put_in_force(masks: Sequence[LayerMask], stack: ExitStack) -> None:
    for mask in masks:
        if has_mask(mask.layer.experts):
            raise InputError("another expert mask is in force; leave its route_through before entering a new one")
        if any(getattr(hook, COUNTS, False) for hook in mask.layer.experts._forward_pre_hooks.values()):
            raise InputError(
                "routing is being counted, which would see choices that the mask takes away; enter `route_through` first, "
                "and `counting` inside it"
            )
    for mask in masks:
        mask.attach(stack)


def _check_applied(masks: Sequence[LayerMask], context: str) -> None:
    if not any(mask.num_routed for mask in masks):
        raise InputError(f"expert mask was never applied: no forward pass ran inside {context}")
    # One number to wait for on each device, however many layers it has.
    flags: dict[torch.device, list[Tensor]] = {}
    for mask in masks:
        flags.setdefault(mask.num_strays.device, []).append(mask.num_strays + mask.num_lost)
    if any(int(torch.stack(of_device).sum()) for of_device in flags.values()):
        for mask in masks:
            _refuse_lost_tokens(mask)


def _refuse_lost_tokens(mask: LayerMask) -> None:
    if mask.num_strays:
        raise InputError(
            f"{mask.layer.name}: the router chose disallowed experts {int(mask.num_strays)} times though enough are "
            "allowed; how this family chooses is not known to moe-ray, so it cannot be masked"
        )
    if mask.num_lost:
        raise InputError(
            f"{mask.layer.name}: the mask left {int(mask.num_lost)} tokens without any expert that has a weight; "
            "how this family chooses is not known to moe-ray, so it cannot be masked"
        )


@contextmanager
def route_towards(model: nn.Module, mask_LE: Mask, *, boost: float) -> Iterator[None]:
    """Adds `boost` to the router logits of the experts of `mask_LE` inside this context; others stay reachable.

    Args:
        model: a transformers MoE model.
        mask_LE: (L, E) bool, True = boosted; a layer with none routes naturally.
        boost: in logits, before the family's softmax or sigmoid.

    Raises:
        InputError: as `route_through`.
    """
    routers = []
    with function_modes_ended(), ExitStack() as stack, uncompiled():
        for layer, boosted_E, _ in _layers_with_experts(model, mask_LE):
            router = EditedRouter(layer, partial(_raised, by_E=boosted_E * boost))
            router.attach(stack)
            routers.append(router)
        yield
    if not any(router.num_calls for router in routers):
        raise InputError("router boost was never applied: no forward pass ran inside route_towards")


def _raised(logits: Tensor, by_E: Tensor) -> Tensor:
    return logits + F.pad(by_E, (0, logits.shape[-1] - len(by_E))).to(logits.dtype)


class _OfLayer(NamedTuple):
    """A layer's part of a mask, on its device and on the host."""

    layer: MoELayer
    allowed: Tensor
    on_host: npt.NDArray[np.bool_]


def _masked_layers(model: nn.Module, mask: npt.NDArray[np.bool_], *, by_row: bool = False) -> list[_OfLayer]:
    found = _layers_with_experts(model, mask, by_row=by_row)
    refuse_unmaskable(item.layer for item in found)
    return found


def _layers_with_experts(model: nn.Module, mask: npt.NDArray[np.bool_], *, by_row: bool = False) -> list[_OfLayer]:
    """Layers with an expert in the mask, or in that of a row, each with its part of it."""
    moe_layers = find_moe_layers(model)
    moe_layers.check_shape(
        np.asarray(mask.any(axis=0)) if by_row else mask, "expert mask of a row" if by_row else "expert mask"
    )
    if not mask.any():
        raise NothingSelected(
            "expert mask allows no expert in any layer; it would do nothing; lower identify.threshold"
        )
    for layer in moe_layers:
        layer.refuse_offloaded()
    by_layer = np.ascontiguousarray(np.moveaxis(mask, -2, 0), dtype=np.bool_)
    # One copy to each device, for all of its layers.
    on_device: dict[torch.device, Tensor] = {}
    found = []
    for row, layer in enumerate(moe_layers):
        device = next(layer.experts.parameters()).device
        if by_layer[row].any():
            if device not in on_device:
                on_device[device] = sent(torch.from_numpy(by_layer), device)
            found.append(_OfLayer(layer, on_device[device][row], by_layer[row]))
    return found

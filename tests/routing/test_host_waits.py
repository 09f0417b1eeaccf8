"""How often the host waits for the device in a forward pass: not once more than the model itself does.

Counted on the CPU, as calls that have a number, or how many there are, for an answer: on a GPU the host waits for each.
Copies to the host are counted where they are asked for, since on the CPU there is nothing to copy. The experts are computed
by grouped products, which are the library's default on GPUs and wait for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from families import build, mask, rows, token_ids
from torch.utils._python_dispatch import TorchDispatchMode

from moe_ray.config.finetune import FinetuneConfig
from moe_ray.finetuning.gradients import accumulate_gradient
from moe_ray.finetuning.trainable_experts import trainable_experts
from moe_ray.models.loss import answer_loss
from moe_ray.routing.capture import count_rows
from moe_ray.routing.counter import counting
from moe_ray.routing.layer_mask import LayerMask
from moe_ray.routing.masking import route_rows_through, route_through, route_towards

_WAITING = {
    torch.ops.aten._local_scalar_dense,  # item, int, float and bool of a tensor
    torch.ops.aten.nonzero,
    torch.ops.aten.masked_select,
    torch.ops.aten._unique2,
    torch.ops.aten.equal,
}
FAMILIES = pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
MASKS_END = {
    "natural": lambda num_passes: 0,
    "boosted": lambda num_passes: 0,
    "annealed": lambda num_passes: 0,
    "masked": lambda num_passes: 1,  # after all of the batch's passes
    # Masks of rows are of a pass; one without an unsafe prompt has none.
    "masked_unsafe": lambda num_passes: 1 if num_passes == 1 else sum(row.is_unsafe for row in ROWS),
    "masked_prompt": lambda num_passes: num_passes,
    "masked_response": lambda num_passes: num_passes,
}
"""Per policy, how often masks end in the passes of a batch."""
IDS, ROWS = token_ids(3, 11), rows((5, 4), (3, 2), (7, 3))


class HostWaits(TorchDispatchMode):
    """Counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_chosen = func.overloadpacket is torch.ops.aten.index and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        self.num += func.overloadpacket in _WAITING or is_chosen
        return func(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch):
    """A context that counts host waits; its number is that of all until now."""

    @contextmanager
    def counted() -> Iterator[HostWaits]:
        with HostWaits() as found, monkeypatch.context() as patched:
            for name in ("cpu", "tolist"):
                whole = getattr(torch.Tensor, name)

                def copied(self: torch.Tensor, whole: Any = whole) -> Any:
                    found.num += 1
                    return whole(self)

                patched.setattr(torch.Tensor, name, copied)
            yield found

    return counted


def grouped(family):
    model = build(family)
    model.config._experts_implementation = "grouped_mm"
    return model


def of_plain_forward(model, waits) -> int:
    with torch.no_grad(), waits() as found:
        model(IDS)
    return found.num


def positions_but_the_first():
    positions_BS = np.ones(IDS.shape, dtype=bool)
    positions_BS[:, 0] = False
    return positions_BS


@FAMILIES
@pytest.mark.parametrize("kind", ["mask", "masks of rows", "masks at some positions", "boost"])
def test_a_mask_waits_once_when_it_ends_and_never_in_a_forward_pass(family, kind, waits):
    model = grouped(family)
    mask_LE = mask(model, (0, 2, 3, 5), (6,))
    masks_BLE = np.stack([mask_LE] * len(IDS))
    within = {
        "mask": lambda: route_through(model, mask_LE),
        "masks of rows": lambda: route_rows_through(model, masks_BLE),
        "masks at some positions": lambda: route_rows_through(model, masks_BLE, positions_but_the_first()),
        "boost": lambda: route_towards(model, mask_LE, boost=2.0),
    }[kind]
    plain = of_plain_forward(model, waits)
    with torch.no_grad(), waits() as found, within():
        entered = found.num
        model(IDS)
        model(IDS)
        passed = found.num
    assert (entered, passed) == (0, 2 * plain)
    assert found.num - passed == (kind != "boost")


@FAMILIES
def test_counting_waits_for_the_counts_and_for_one_flag_however_many_layers_there_are(family, waits):
    model = grouped(family)
    with counting(model) as counter, waits() as found:
        count_rows(model, counter, ROWS, pad_id=0)
    with torch.inference_mode(), waits() as plain:
        model.model(IDS)
    assert found.num - plain.num == 2
    with counting(model, weights=True, ids=True) as counter, waits() as more:
        count_rows(model, counter, ROWS, pad_id=0)
    assert more.num - found.num == 3  # weights, ids, and whose they are


@pytest.mark.slow
@FAMILIES
@pytest.mark.parametrize("routing", list(MASKS_END))
@pytest.mark.parametrize("rows_per_forward", [3, 1])
def test_a_batch_in_training_waits_for_its_loss_and_what_was_routed_and_for_no_layer(
    family, routing, rows_per_forward, waits
):
    model = grouped(family)
    mask_LE = mask(model, (0, 2, 3, 5), (6,))
    boost = 2.0 if routing in ("boosted", "annealed") else 0.0
    config = FinetuneConfig(routing=routing, boost=boost, rows_per_forward=rows_per_forward, tokens_of_a_pass=1000)
    num_passes = len(ROWS) // rows_per_forward
    with waits() as plain:
        for start in range(0, len(ROWS), rows_per_forward):
            answer_loss(model, ROWS[start : start + rows_per_forward], pad_id=0).sum().backward()
    with trainable_experts(model, mask_LE) as trainable, waits() as found:
        accumulate_gradient(model, trainable, ROWS, mask_LE, config=config, pad_id=0)
    # The loss and both views of what was routed; where masks end, whether they held: once, or in every pass.
    assert found.num - plain.num == 3 + MASKS_END[routing](num_passes)


def test_a_wait_in_every_layer_would_be_seen(monkeypatch, waits):
    settle = LayerMask.settle

    def looks(self, index_TK):
        settled = settle(self, index_TK)
        assert int(settled[1].sum()) >= 0
        return settled

    monkeypatch.setattr(LayerMask, "settle", looks)
    model = grouped("olmoe")
    plain = of_plain_forward(model, waits)
    with torch.no_grad(), route_through(model, mask(model, (0, 2, 3, 5), (6,))), waits() as found:
        model(IDS)
    assert found.num - plain == 2

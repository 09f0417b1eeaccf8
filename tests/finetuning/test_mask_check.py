"""A batch that did not train under its own mask is stopped before anything moves (invariant 17)."""

from dataclasses import replace

import numpy as np
import pytest

from moe_ray.experts import Expert
from moe_ray.finetuning.mask_check import Observation, check_routing

LISTED = frozenset({Expert(1, 0), Expert(1, 2), Expert(4, 3)})


def as_mask(*cells):
    """(2, 4) with the named (row, expert) cells."""
    mask_LE = np.zeros((2, 4), dtype=bool)
    for cell in cells:
        mask_LE[cell] = True
    return mask_LE


OBEYED = Observation(
    batch_idx=7,
    listed=LISTED,
    mask_LE=as_mask((0, 0), (0, 2), (1, 3)),
    routed_LE=as_mask((0, 2), (1, 3)),
    restricted_LE=as_mask((0, 2), (1, 3)),
    layers=(1, 4),
    restricting=frozenset({1, 4}),
)


def test_tokens_at_some_of_the_batchs_experts_in_every_layer_pass():
    check_routing(OBEYED)


@pytest.mark.parametrize("cell", [(0, 1), (0, 3), (1, 0), (1, 1), (1, 2)])
def test_one_token_at_any_other_expert_is_named(cell):
    restricted_LE = OBEYED.routed_LE | as_mask(cell)
    layer, expert = OBEYED.layers[cell[0]], cell[1]
    with pytest.raises(RuntimeError, match=f"batch 7: tokens reached {Expert(layer, expert)}"):
        check_routing(replace(OBEYED, routed_LE=restricted_LE, restricted_LE=restricted_LE))


def test_a_token_that_is_not_restricted_may_go_anywhere():
    check_routing(replace(OBEYED, routed_LE=OBEYED.routed_LE | as_mask((0, 1), (1, 0))))


def test_in_a_layer_that_does_not_restrict_any_token_may_go_anywhere():
    everywhere_LE = OBEYED.routed_LE | as_mask((1, 0))
    check_routing(replace(OBEYED, routed_LE=everywhere_LE, restricted_LE=everywhere_LE, restricting=frozenset({1})))


@pytest.mark.parametrize("mask_LE", [as_mask((0, 0), (0, 2)), as_mask((0, 0), (0, 2), (1, 3), (0, 1)), as_mask()])
def test_a_mask_that_is_not_the_batchs_own_is_refused(mask_LE):
    with pytest.raises(RuntimeError, match="the mask in force was not its own; they differ in"):
        check_routing(replace(OBEYED, mask_LE=mask_LE))


def test_a_layer_with_experts_that_no_token_reached_is_named():
    with pytest.raises(RuntimeError, match=r"the experts of layers \[4\] were never called"):
        check_routing(replace(OBEYED, routed_LE=as_mask((0, 2))))

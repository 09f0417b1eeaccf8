"""What is watched at every training step: that a batch trained under its own mask, and that the mask was obeyed.

A mask that is stored and never applied, or looked up by position, trains something and reports success. The check
compares what the experts modules really received with the batch's own list of unsafe experts, before anything moves.

Shape suffixes: L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moe_ray.experts import Expert, Mask, mask_to_experts


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One batch's forward and backward, before the optimiser step.

    Attributes:
        batch_idx: the batch.
        listed: its unsafe experts, from its list and not from its mask.
        mask_LE: (L, E) the mask that was in force.
        routed_LE: (L, E) experts that some token was routed to with a weight, in the layers that train.
        restricted_LE: (L, E) the same of the tokens that the routing policy keeps to the batch's own experts: all of them,
            those of unsafe prompts, of prompts or of responses; none where it keeps no token.
        layers: L decoder layer indices.
        restricting: layers where those tokens may reach the batch's own experts only.
    """

    batch_idx: int
    listed: frozenset[Expert]
    mask_LE: Mask
    routed_LE: Mask
    restricted_LE: Mask
    layers: tuple[int, ...]
    restricting: frozenset[int]


Monitor = Callable[[Observation], None]
"""Called for every batch before the step's update; raises to stop it."""


def check_routing(seen: Observation) -> None:
    """The mask in force was the batch's own, every layer of it ran, and no restricted token reached a disallowed expert.

    Raises:
        RuntimeError: one of these does not hold; nothing has been updated by this step.
    """
    in_force = set(mask_to_experts(seen.mask_LE, seen.layers))
    routed = mask_to_experts(seen.routed_LE, seen.layers)
    restricted = mask_to_experts(seen.restricted_LE, seen.layers)
    outside = [expert for expert in restricted if expert.layer in seen.restricting and expert not in seen.listed]
    if outside:
        raise RuntimeError(
            f"batch {seen.batch_idx}: tokens reached {outside[0]}, which is not one of its unsafe experts; the mask in "
            "force was not its own"
        )
    if in_force != seen.listed:
        raise RuntimeError(
            f"batch {seen.batch_idx}: the mask in force was not its own; they differ in {sorted(in_force ^ seen.listed)[:5]}"
        )
    silent = {expert.layer for expert in seen.listed} - {expert.layer for expert in routed}
    if silent:
        raise RuntimeError(
            f"batch {seen.batch_idx}: the experts of layers {sorted(silent)} were never called under its mask"
        )

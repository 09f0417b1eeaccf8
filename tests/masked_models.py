"""Masks of many kinds, and models from which the experts that a mask disallows were cut out: the oracle of invariant 7."""

from __future__ import annotations

import copy
from types import MethodType

import numpy as np
import torch
from families import NUM_EXPERTS, mask
from torch import nn

from moe_ray.models.moe_layers import find_moe_layers

LOGIT_TOLERANCE = 1e-5
"""float32; logits of the tiny models are of order 5. Sums over fewer experts round differently in the last bit."""

MASKS = {
    "more than k": ((0, 2, 3, 5, 7), (1, 4, 5, 6)),
    "half of each group": ((0, 1, 4, 5), (2, 3, 6, 7)),
    "exactly k": ((1, 3, 6), (2, 5)),
    "short and empty": ((6,), ()),
    "empty and short": ((), (3,)),
    "one group only": ((4, 5, 6, 7), (0, 1, 2, 3)),
}


def mask_named(model: nn.Module, name: str):
    return mask(model, *MASKS[name])


def without_disallowed(model: nn.Module, mask_LE) -> nn.Module:
    """A deep copy from whose layers the disallowed experts were cut out; layers that allow none are left alone.

    k becomes min(k, allowed). Two routers cannot run on what is left, so they are replaced by what they say: PhiMoE's
    sparsemixer always takes a second expert (with one left: that one, weight 1), and a router with groups of equal size
    gets `_choose_by_group`.
    """
    oracle = copy.deepcopy(model)
    for layer, row in zip(find_moe_layers(oracle), mask_LE, strict=True):
        kept = np.flatnonzero(row)
        if not len(kept):
            continue
        groups = kept * getattr(layer.router, "num_group", 1) // NUM_EXPERTS
        for name, tensor in layer.expert_tensors().items():
            setattr(layer.experts, name, nn.Parameter(tensor.detach()[kept]))
        _cut_router(layer, kept)
        layer.experts.num_experts = layer.router.num_experts = len(kept)
        layer.router.top_k = min(layer.num_experts_per_tok, len(kept))
        if len(kept) == 1 and type(layer.router).__name__ == "PhimoeTopKRouter":
            layer.router.forward = lambda hidden: (None, torch.ones(len(hidden), 1), torch.zeros(len(hidden), 1).long())
        if hasattr(layer.router, "num_group"):
            layer.router.groups_of_kept = groups.tolist()
            layer.router.forward = MethodType(_choose_by_group, layer.router)
    return oracle


def _cut_router(layer, kept) -> None:
    for module in layer.block.modules():
        if module is layer.experts:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            is_routers = module is layer.router and parameter.shape[0] == NUM_EXPERTS
            if is_routers or any(parameter is bias for bias in layer.selection_biases()):
                cut = parameter.detach()[..., kept] if parameter.shape[0] == 1 else parameter.detach()[kept]
                setattr(module, name, nn.Parameter(cut, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.shape == (NUM_EXPERTS,):
                setattr(module, name, buffer[kept])


def _choose_by_group(router, hidden):
    """DeepSeek-V3's rule, token by token: the best groups, and in them the best experts.

    A group is as good as the sum of its two best scores; a group that kept one expert comes after those with two.
    """
    logits = nn.functional.linear(hidden.view(-1, router.hidden_dim), router.weight)
    scores, chosen, weights = logits.sigmoid(), [], []
    for choice, score in zip((scores + router.e_score_correction_bias).tolist(), scores, strict=True):
        best_two = {
            group: sorted((s for s, g in zip(choice, router.groups_of_kept, strict=True) if g == group), reverse=True)[
                :2
            ]
            for group in set(router.groups_of_kept)
        }
        ranked = sorted(best_two, key=lambda group: (len(best_two[group]), sum(best_two[group])), reverse=True)
        candidates = [n for n, group in enumerate(router.groups_of_kept) if group in ranked[: router.topk_group]]
        best = sorted(candidates, key=lambda n: choice[n], reverse=True)[: router.top_k]
        weight = score[best] / score[best].sum() if router.norm_topk_prob else score[best]
        missing = router.top_k - len(best)
        chosen.append(torch.tensor(best + best[:1] * missing))
        weights.append(nn.functional.pad(weight * router.routed_scaling_factor, (0, missing)))
    return logits, torch.stack(weights), torch.stack(chosen)

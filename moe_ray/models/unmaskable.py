"""Routers that choose in a way that no mask can restrict, known by their structure and refused before any work is done.

Their routing can be counted. What is not known here is seen while a mask is in force: a choice of disallowed experts though
enough are allowed, or a token that is left without any expert (`moe_ray.routing.masking`).
"""

from __future__ import annotations

from collections.abc import Iterable

from moe_ray.errors import InputError
from moe_ray.models.moe_layers import MoELayer


def refuse_unmaskable(layers: Iterable[MoELayer]) -> None:
    """Refuses layers whose router cannot be kept to some of its experts.

    Raises:
        InputError: a router looks its experts up by token id, or chooses experts of groups that it has not chosen.
    """
    for layer in layers:
        why = _looked_up(layer) or _fills_groups_with_zero(layer)
        if why:
            raise InputError(
                f"{layer.name}: {why}, so its routing can be counted, but not masked; choose another model.path, or "
                "settings without masks: finetune.routing natural, boosted or annealed, evaluate.routing=natural, "
                "ablate.run=false, and no mask_only or policy:masked in compare.names"
            )


def _looked_up(layer: MoELayer) -> str:
    """DeepSeek-V4's first layers: the logits weigh the experts that a table names, and choose none."""
    tables = [
        buffer for buffer in layer.router.buffers(recurse=False) if buffer.dim() == 2 and not buffer.is_floating_point()
    ]
    if any(table.shape[1] == layer.num_experts_per_tok for table in tables):
        return "its router takes experts from a table by token id, whatever the logits"
    return ""


def _fills_groups_with_zero(layer: MoELayer) -> str:
    """A.X-K2 with groups: score plus bias is set to 0 in groups that were not chosen, which may be above a lowered one."""
    # Others fill with minus infinity, or score by a softmax, where nothing is below 0.
    if layer.has_expert_groups() and hasattr(layer.router, "apply_group_scoring"):
        return (
            "its router gives experts of groups that it has not chosen a score of 0, above that of disallowed experts"
        )
    return ""

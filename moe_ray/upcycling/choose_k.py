"""How many experts a token of a split model needs: what leaving out the others costs, measured."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_ray.models.tokenization import TokenizedRow
from moe_ray.upcycling.calibration import NatsPerToken, nats_per_token
from moe_ray.upcycling.split import SplitPlan, split

logger = logging.getLogger(__name__)

SHARES = (1 / 2, 5 / 8, 3 / 4, 7 / 8)
"""Of a layer's experts that are tried, the smallest first."""


def choose_k(
    dense: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: SplitPlan,
    held_out: Sequence[TokenizedRow],
    *,
    max_rise: float,
    tried: Sequence[int] | None = None,
) -> tuple[int, dict[int, NatsPerToken]]:
    """The smallest tried number of experts per token that costs at most `max_rise`; the largest, where none does.

    Args:
        dense: the model that the plan was made of.
        tokenizer: its tokenizer.
        plan: from `plan_split`.
        held_out: from `own_answers`.
        max_rise: of nats per token, on neutral text and on the dense model's own answers alike.
        tried: numbers of experts, ascending; None = `SHARES` of them.

    Returns:
        the number, and what each tried number came to; 0 stands for the dense model.
    """
    measured = {0: nats_per_token(dense, tokenizer, held_out)}
    if tried is None:
        tried = sorted({max(1, math.ceil(share * plan.num_experts)) for share in SHARES})
    for k in tried:
        measured[k] = nats_per_token(split(dense, plan, num_experts_per_tok=k), tokenizer, held_out)
        rise = measured[k] - measured[0]
        logger.info(
            "%d of %d experts: %+.3f nats per token on neutral text, %+.3f on own answers", k, plan.num_experts, *rise
        )
        if all(part <= max_rise for part in rise if not math.isnan(part)):
            return k, measured
    if len(tried) > 1:
        logger.warning("no number of experts costs at most %g nats per token; taking %d", max_rise, tried[-1])
    return tried[-1], measured

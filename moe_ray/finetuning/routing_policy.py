"""Where a batch's tokens may go while it trains: the policies of `finetune.routing`.

Whatever the policy, gradients reach the batch's experts only (`trainable_experts`). A policy says which tokens are
*restricted*, that is kept to those experts, or by how much the router is pulled towards them. Restricting every token means
restricting the safe prompts of a batch too, which the model would answer by other experts: half of the batch then teaches
the unsafe experts to answer safe prompts, which nobody asks of them later (docs/policies.md).

Shape suffixes: B rows, S positions, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import nn

from moe_ray.config.finetune import FinetuneConfig, TrainingRouting
from moe_ray.errors import InputError
from moe_ray.experts import Mask, ShortLayers, router_mask
from moe_ray.models.tokenization import TokenizedRow
from moe_ray.routing.masking import route_rows_through, route_through, route_towards


@dataclass(frozen=True, kw_only=True)
class RoutingPolicy:
    """One policy as it is at one step.

    Attributes:
        kind: its name in `finetune.routing`.
        boost: what it adds to the router logits of the batch's experts at this step; 0 = nothing.
        short_layers: where restricted tokens may go in layers with fewer of the batch's experts than a token uses.
    """

    kind: TrainingRouting = "masked"
    boost: float = 0.0
    short_layers: ShortLayers = "allowed_only"

    @classmethod
    def at_step(cls, config: FinetuneConfig, step: int, num_steps: int) -> RoutingPolicy:
        """The configured policy at a step; what changes over a training depends on the step's number alone.

        Args:
            config: `routing`, `boost`, `anneal_share` and `short_layers`.
            step: 0-based.
            num_steps: of the whole run.
        """
        boost = config.boost
        if config.routing == "annealed":
            boost *= max(0.0, 1 - step / (config.anneal_share * num_steps))
        return cls(kind=config.routing, boost=boost, short_layers=config.short_layers)

    @property
    def restricts_every_token(self) -> bool:
        """Each token of the batch is restricted."""
        return self.kind == "masked"

    @property
    def restricts_some_tokens(self) -> bool:
        """Some are and others are not, by the prompt's label or by the part of the conversation."""
        return self.kind in ("masked_unsafe", "masked_prompt", "masked_response")

    def reachable(self, mask_LE: Mask, *, num_experts_per_tok: int) -> Mask:
        """(L, E): what restricted tokens may be routed to; a layer with no True restricts none of them.

        Args:
            mask_LE: (L, E) the batch's experts.
            num_experts_per_tok: the router's k.
        """
        if not (self.restricts_every_token or self.restricts_some_tokens):
            return np.zeros_like(mask_LE)
        return router_mask(mask_LE, num_experts_per_tok=num_experts_per_tok, short_layers=self.short_layers)

    def restricted_tokens(self, rows: Sequence[TokenizedRow]) -> npt.NDArray[np.bool_]:
        """(B, S): which tokens of a pass of these rows, padded on the right, are restricted; padding never is.

        Raises:
            InputError: the policy goes by the label of a prompt, and a row has none.
        """
        restricted_BS = np.zeros((len(rows), max(row.num_tokens for row in rows)), dtype=bool)
        for restricted_S, row in zip(restricted_BS, rows, strict=True):
            restricted_S[self._restricted_part(row)] = True
        return restricted_BS

    def _restricted_part(self, row: TokenizedRow) -> slice:
        if self.restricts_every_token:
            return slice(0, row.num_tokens)
        if self.kind == "masked_prompt":
            return slice(0, len(row.prompt_ids))
        if self.kind == "masked_response":
            return slice(len(row.prompt_ids), row.num_tokens)
        if self.kind == "masked_unsafe":
            if row.is_unsafe is None:
                raise InputError(
                    "finetune.routing=masked_unsafe: got a row without a label, expected safe or unsafe ones; give rows "
                    "with `is_unsafe`, or choose another policy"
                )
            return slice(0, row.num_tokens if row.is_unsafe else 0)
        return slice(0, 0)

    def on_batch(self, model: nn.Module, mask_LE: Mask, reachable_LE: Mask) -> AbstractContextManager[None]:
        """What is in force for all tokens of a batch; forward and backward of its passes run inside.

        Args:
            model: a transformers MoE model.
            mask_LE: (L, E) the batch's experts.
            reachable_LE: (L, E) of `reachable`.
        """
        if self.restricts_every_token and reachable_LE.any():
            return route_through(model, reachable_LE)
        if self.boost > 0:
            return route_towards(model, mask_LE, boost=self.boost)
        return nullcontext()

    def on_pass(
        self, model: nn.Module, rows: Sequence[TokenizedRow], reachable_LE: Mask
    ) -> AbstractContextManager[None]:
        """What is in force for some tokens of one forward pass and its backward, inside `on_batch`.

        Args:
            model: a transformers MoE model.
            rows: of the pass.
            reachable_LE: (L, E) of `reachable`.
        """
        if not self.restricts_some_tokens or not reachable_LE.any():
            return nullcontext()
        restricted_BS = self.restricted_tokens(rows)
        if self.kind != "masked_unsafe":
            return route_rows_through(model, np.repeat(reachable_LE[None], len(rows), axis=0), restricted_BS)
        is_masked_B = restricted_BS.max(axis=1)
        masks_BLE = np.logical_and(is_masked_B[:, None, None], reachable_LE)
        return route_rows_through(model, masks_BLE) if masks_BLE.any() else nullcontext()

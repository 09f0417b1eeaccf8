"""Scores of experts that are captured beside the counts: attributions of answers, saliency, and the routing of refusals.

Shape suffixes: B rows, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_ray.attribution.gate_attribution import gate_attribution
from moe_ray.attribution.saliency import router_weighted_saliency
from moe_ray.attribution.weight_attribution import weight_attribution
from moe_ray.errors import InputError, NotFinite
from moe_ray.models.loading import context_length
from moe_ray.models.tokenization import RESPONSE, TokenizedRow, pad_token_id, target_ids
from moe_ray.routing.capture import RowScores, count_rows
from moe_ray.routing.counter import RoutingCounter
from moe_ray.routing.counts import ROLES


@dataclass(frozen=True, kw_only=True)
class RowScorer:
    """Measures scores of rows, in forward passes of their own.

    Attributes:
        model: a causal language model, in eval mode.
        tokenizer: its tokenizer.
        counter: attached to the model.
        scores: see `capture.scores`; none = nothing is measured.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    counter: RoutingCounter
    scores: Collection[str]

    def __post_init__(self) -> None:
        """Refuses a model that cannot be measured, before any work is done.

        Raises:
            InputError: `attribution` is measured, and the layers have no slice per expert that is a weight and is here.
        """
        for layer in self.counter.moe_layers if "attribution" in self.scores else ():
            layer.refuse_offloaded()
            layer.expert_stacks()

    def __call__(
        self, rows: Sequence[TokenizedRow], *, labels: Sequence[str], targets: Sequence[str | None]
    ) -> RowScores:
        """The scores of rows by their name in `RoutingCounts`, the second axis that of `ROLES`.

        What is of an answer and not of tokens stands at `response`, and is 0 elsewhere and for a row without an answer.
        The counter's `last_weights` and `last_ids` are not those of the rows afterwards.

        Args:
            rows: B prompts with their answers, which may be empty.
            labels: (B,) of the examples.
            targets: (B,) what `refusal` takes for the refusal of an unsafe example.

        Raises:
            InputError: an unsafe example has no target and `refusal` is measured.
            NotFinite: a score is infinite or undefined.
        """
        if not self.scores:
            return {}
        found: dict[str, npt.NDArray[Any]] = {}
        answered = [index for index, row in enumerate(rows) if row.answer_ids]
        if "attribution" in self.scores:
            found["attribution_NLE"] = self._of_answers(rows, answered, self._attributions)
        if "gate" in self.scores:
            found["gate_NLE"] = self._of_answers(rows, answered, self._gates)
        if "reap" in self.scores:
            found["reap_NLE"] = router_weighted_saliency(self.model, rows, pad_id=self._pad_id).astype(np.float32)
        if "refusal" in self.scores:
            refusals = self._refusals(rows, labels, targets)
            refused = [index for index, row in enumerate(refusals) if row.answer_ids]
            found |= self._routing_of(refusals, refused)
            if "gate" in self.scores:
                found["gate_refusal_NLE"] = self._of_answers(refusals, refused, self._gates)
        if not all(np.isfinite(values).all() for values in found.values()):
            raise NotFinite("a score of an expert is not finite; try another model.dtype")
        return found

    @property
    def _pad_id(self) -> int:
        return pad_token_id(self.tokenizer)

    def _empty(self, num_rows: int, dtype: Any) -> npt.NDArray[Any]:
        layers = self.counter.moe_layers
        return np.zeros((num_rows, len(ROLES), len(layers), layers.num_experts), dtype=dtype)

    def _of_answers(self, rows: Sequence[TokenizedRow], answered: list[int], measure: Any) -> npt.NDArray[np.float32]:
        scores = self._empty(len(rows), np.float32)
        if answered:
            scores[answered, RESPONSE] = measure([rows[index] for index in answered])
        return scores

    def _attributions(self, rows: Sequence[TokenizedRow]) -> npt.NDArray[np.float64]:
        return np.stack([weight_attribution(self.model, row, pad_id=self._pad_id) for row in rows])

    def _gates(self, rows: Sequence[TokenizedRow]) -> npt.NDArray[np.float64]:
        return gate_attribution(self.model, rows, pad_id=self._pad_id)

    def _refusals(
        self, rows: Sequence[TokenizedRow], labels: Sequence[str], targets: Sequence[str | None]
    ) -> list[TokenizedRow]:
        """The unsafe rows with their target in place of their answer, the others with none."""
        limit = context_length(self.model)
        found = []
        for row, label, target in zip(rows, labels, targets, strict=True):
            ids: list[int] = []
            if label == "unsafe" and row.answer_ids:
                if not target:
                    raise InputError(
                        "capture.scores=refusal: got an unsafe example without a target, expected the refusal that its "
                        "answer is compared with; give the examples a target, or let `prepare` give them prompts.refusal"
                    )
                ids = target_ids(self.tokenizer, target)
            ids = ids[: limit - len(row.prompt_ids)] if limit else ids
            counted = None
            if row.counted is not None:
                # The end token belongs to the chat template, as that of a generated answer does.
                counted = [*row.counted[: len(row.prompt_ids)], *[True] * (len(ids) - 1), *[False] * bool(ids)]
            found.append(TokenizedRow(row.prompt_ids, ids, counted, num_thought=row.num_thought))
        return found

    def _routing_of(self, refusals: Sequence[TokenizedRow], refused: list[int]) -> dict[str, npt.NDArray[Any]]:
        counts, num_tokens = self._empty(len(refusals), np.int32), np.zeros((len(refusals), len(ROLES)), np.int64)
        if refused:
            chosen = [refusals[index] for index in refused]
            of_chosen, tokens_of_chosen = count_rows(self.model, self.counter, chosen, pad_id=self._pad_id)
            counts[refused, RESPONSE] = of_chosen[:, RESPONSE]
            num_tokens[refused, RESPONSE] = tokens_of_chosen[:, RESPONSE]
        return {"refusal_NLE": counts, "refusal_tokens": num_tokens}

"""What the selection rules compare: for each of them samples with prompts as the unit, and the column they rank by.

Every rule that compares gets the same statistics of its own comparison. Scores of answers (`attribution`, `gate`) and
saliency (`reap`) are means over prompts, unsafe minus safe. Answers against refusals (`comply_refuse`, `gate_refuse`) are
differences within unsafe prompts: each prompt is a pair of its answer and its refusal, so that relabelling exchanges the
two, which turns the sign of the prompt's difference, and resampling draws prompts.

Shape suffixes: N examples, M examples with an answer, X experts of all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_ray.config.identify import SCORES_OF_RULE, IdentifyConfig
from moe_ray.errors import InputError
from moe_ray.identification.risk import ExampleCounts, Floats
from moe_ray.identification.samples import Samples
from moe_ray.routing.counts import RoutingCounts


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A comparison of two sides that a rule ranks experts by.

    Attributes:
        captured: what of `RoutingCounts` it needs.
        columns: of the risk table: the mean of the side that counts against an expert, that of the other, and the
            difference, which the rule ranks by.
        name: of the difference, in words.
        samples: from a batch, what is compared, the first side as `unsafe`; None where a side has no example, or it was not
            captured.
        is_relative: the values have no scale of their own, so that experts are cut at a share of the largest.
        needs: what a batch must have, for the message where it lacks it.
    """

    captured: tuple[str, ...]
    columns: tuple[str, str, str]
    name: str
    samples: Callable[[ExampleCounts, IdentifyConfig], Samples | None]
    is_relative: bool
    needs: str


def _of_answers(name: str) -> Callable[[ExampleCounts, IdentifyConfig], Samples | None]:
    def samples(batch: ExampleCounts, config: IdentifyConfig) -> Samples | None:
        answers = batch.answers
        values_MX = None if answers is None else getattr(answers, name)
        if answers is None or values_MX is None or not answers.has_both_labels:
            return None
        return Samples.of(values_MX, np.ones(len(values_MX)), answers.is_unsafe_M, answers.pairs_M)

    return samples


def _of_saliency(batch: ExampleCounts, config: IdentifyConfig) -> Samples | None:
    if batch.reap_NX is None:
        return None
    # The mean over an expert's own tokens; an expert without any in a prompt did nothing there.
    mean_NX = np.divide(batch.reap_NX, batch.counts_NX, out=np.zeros_like(batch.reap_NX), where=batch.counts_NX > 0)
    return Samples.of(mean_NX, np.ones(len(mean_NX)), batch.is_unsafe_N, batch.pairs_N)


def _of_refusals(batch: ExampleCounts, config: IdentifyConfig) -> Samples | None:
    answers = batch.answers
    if (
        answers is None
        or answers.refusal_MX is None
        or answers.refusal_tokens_M is None
        or not answers.is_refused_too.any()
    ):
        return None
    refused = answers.is_refused_too
    tokens = answers.tokens_M[refused], answers.refusal_tokens_M[refused]
    counts = answers.counts_MX[refused], answers.refusal_MX[refused]
    if config.weighting != "prompts":  # The weights of a refusal's tokens are not captured.
        return _within_prompts(*counts, *tokens)
    rates = [of / size[:, None] for of, size in zip(counts, tokens, strict=True)]
    return _within_prompts(rates[0], rates[1])


def _of_gates_against_refusals(batch: ExampleCounts, config: IdentifyConfig) -> Samples | None:
    answers = batch.answers
    if (
        answers is None
        or answers.gate_MX is None
        or answers.gate_refusal_MX is None
        or not answers.is_refused_too.any()
    ):
        return None
    return _within_prompts(answers.gate_MX[answers.is_refused_too], answers.gate_refusal_MX[answers.is_refused_too])


def _within_prompts(
    first_MX: Floats,
    second_MX: Floats,
    first_M: npt.NDArray[np.int64] | None = None,
    second_M: npt.NDArray[np.int64] | None = None,
) -> Samples:
    """Each prompt's two sides as a pair; sizes of 1 where none are given."""
    num = len(first_MX)
    ones = np.ones(num)
    sizes = np.concatenate([ones if first_M is None else first_M, ones if second_M is None else second_M])
    pairs = np.array([f"prompt {index}" for index in range(num)] * 2, dtype=object)
    return Samples.of(np.concatenate([first_MX, second_MX]), sizes, np.repeat([True, False], num), pairs)


_ANSWERS = "answers to safe and to unsafe prompts: give examples a `response`, or set capture.generate=true"
_REFUSED = "answers to unsafe prompts: give them a `response`, or set capture.generate=true"

COMPARISONS: Mapping[str, Comparison] = {
    "attribution": Comparison(
        captured=("attribution_NLE",),
        columns=("attribution_unsafe", "attribution_safe", "attribution_diff"),
        name="difference of weight attribution",
        samples=_of_answers("attribution_MX"),
        is_relative=True,
        needs=_ANSWERS,
    ),
    "gate": Comparison(
        captured=("gate_NLE",),
        columns=("gate_unsafe", "gate_safe", "gate_diff"),
        name="difference of gate attribution",
        samples=_of_answers("gate_MX"),
        is_relative=True,
        needs=_ANSWERS,
    ),
    "reap": Comparison(
        captured=("reap_NLE",),
        columns=("reap_unsafe", "reap_safe", "reap_diff"),
        name="difference of saliency",
        samples=_of_saliency,
        is_relative=True,
        needs="tokens in identify.roles of both labels",
    ),
    "comply_refuse": Comparison(
        captured=("refusal_NLE", "refusal_tokens"),
        columns=("comply_n", "refuse_n", "comply_refuse_diff"),
        name="difference between answers and refusals",
        samples=_of_refusals,
        is_relative=False,
        needs=_REFUSED,
    ),
    "gate_refuse": Comparison(
        captured=("gate_NLE", "gate_refusal_NLE", "refusal_tokens"),
        columns=("gate_comply", "gate_refuse", "gate_refuse_diff"),
        name="difference of gate attribution between answers and refusals",
        samples=_of_gates_against_refusals,
        is_relative=True,
        needs=_REFUSED,
    ),
}
"""By `identify.rule`, the comparisons that need more than routing counts."""


def is_relative(config: IdentifyConfig) -> bool:
    """Whether the rule cuts experts at a share of the largest value, `min_share`, and not at `threshold`."""
    return config.rule in COMPARISONS and COMPARISONS[config.rule].is_relative


def captured_comparisons(counts: RoutingCounts, config: IdentifyConfig) -> tuple[Comparison, ...]:
    """The comparisons whose scores the counts hold.

    Raises:
        InputError: the configured rule's is not among them.
    """
    found = {
        rule: comparison
        for rule, comparison in COMPARISONS.items()
        if all(getattr(counts, name) is not None for name in comparison.captured)
    }
    if config.rule in COMPARISONS and config.rule not in found:
        wanted = ", ".join(SCORES_OF_RULE[config.rule])
        raise InputError(
            f"identify.rule={config.rule} needs scores that these routing counts lack; capture them again with "
            f"capture.scores=[{wanted}]"
        )
    return tuple(found.values())


def compared(batch: ExampleCounts, config: IdentifyConfig) -> Samples:
    """What the rule, one of `COMPARISONS`, compares in a batch.

    Raises:
        InputError: one side has no example.
    """
    comparison = COMPARISONS[config.rule]
    samples = comparison.samples(batch, config)
    if samples is None:
        raise InputError(
            f"identify.rule={config.rule}: batch {batch.batch_idx} lacks {comparison.needs}; or use another rule"
        )
    return samples

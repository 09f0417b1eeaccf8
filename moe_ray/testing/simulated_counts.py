"""Simulated routing counts whose answer is known: to see what a number of prompts can and cannot find.

Every prompt prefers experts in its own way, around a taste that all prompts share; every token then picks
`num_experts_per_tok` of them. In unsafe prompts each planted expert replaces another for a given share of the
tokens, so its rate is higher by exactly that share on average.

Shape suffixes: T tokens of a prompt, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from moe_ray.experts import Expert
from moe_ray.routing.counts import RoutingCounts, concat_counts


@dataclass(frozen=True, kw_only=True)
class Population:
    """What prompts and model are like.

    Attributes:
        num_layers: MoE layers.
        num_experts: per layer.
        num_experts_per_tok: experts a token picks.
        shared_taste: standard deviation over experts of the logits that all prompts share.
        own_taste: standard deviation over prompts of each expert's logit; what makes tokens of one prompt alike.
        safe_tokens: least and greatest length of a safe prompt.
        unsafe_tokens: the same for unsafe prompts.
        seed: of the shared taste.
    """

    num_layers: int = 4
    num_experts: int = 16
    num_experts_per_tok: int = 2
    shared_taste: float = 0.7
    own_taste: float = 0.5
    safe_tokens: tuple[int, int] = (10, 60)
    unsafe_tokens: tuple[int, int] = (10, 60)
    seed: int = 0


def simulate(
    population: Population,
    *,
    num_batches: int = 1,
    safe_per_batch: int = 8,
    unsafe_per_batch: int = 8,
    planted: Sequence[Expert] = (),
    shift: float = 0.0,
    seed: int = 0,
) -> RoutingCounts:
    """Counts of `num_batches` batches of independent prompts.

    Args:
        population: of prompts and model.
        num_batches: `batch_idx` runs from 0.
        safe_per_batch: safe prompts in a batch.
        unsafe_per_batch: unsafe prompts in a batch.
        planted: experts that unsafe tokens use more often; layers count from 0.
        shift: by how much their rate is higher on unsafe tokens (fraction of tokens).
        seed: of the prompts.
    """
    shape = (population.num_layers, population.num_experts)
    taste_LE = population.shared_taste * np.random.default_rng(population.seed).standard_normal(shape)
    rng = np.random.default_rng([population.seed, seed])
    labels = ["safe"] * safe_per_batch + ["unsafe"] * unsafe_per_batch
    by_prompt = [planted if label == "unsafe" else () for label in labels]
    return concat_counts([_batch(population, taste_LE, i, labels, by_prompt, shift, rng) for i in range(num_batches)])


def simulate_confounded(
    population: Population,
    *,
    num_batches: int = 1,
    num_per_label: int = 12,
    num_confounded: int = 9,
    by_harm: Sequence[Expert] = (),
    by_topic: Sequence[Expert] = (),
    by_template: Sequence[Expert] = (),
    shift: float = 0.0,
    seed: int = 0,
) -> tuple[RoutingCounts, pd.DataFrame]:
    """Counts of prompts whose topic and template go with their label, and the prompts' fields.

    Most unsafe prompts are about topic `b` and most safe ones about topic `a`; templates go with labels in the same way,
    and topic and template are independent of each other within a label as far as their numbers allow.

    Args:
        population: of prompts and model.
        num_batches: `batch_idx` runs from 0.
        num_per_label: safe prompts in a batch, and unsafe ones.
        num_confounded: of them, unsafe prompts about topic `b` and safe ones about topic `a`; templates alike.
        by_harm: experts that tokens of unsafe prompts use more often, whatever they are about.
        by_topic: experts that tokens of prompts about topic `b` use more often, whatever their label.
        by_template: the same of template `b`.
        shift: by how much (fraction of tokens).
        seed: of the prompts.

    Returns:
        the counts, and rows with `batch_idx, in_batch_idx, topic, template`.
    """
    shape = (population.num_layers, population.num_experts)
    taste_LE = population.shared_taste * np.random.default_rng(population.seed).standard_normal(shape)
    rng = np.random.default_rng([population.seed, seed])
    labels = ["safe"] * num_per_label + ["unsafe"] * num_per_label
    parts, fields = [], []
    for batch_idx in range(num_batches):
        usual = np.arange(num_per_label) < num_confounded
        levels = {
            name: ["a" if one else "b" for one in rng.permutation(usual)]
            + ["b" if one else "a" for one in rng.permutation(usual)]
            for name in ("topic", "template")
        }
        by_prompt = [
            [
                *(by_harm if label == "unsafe" else ()),
                *(by_topic if levels["topic"][place] == "b" else ()),
                *(by_template if levels["template"][place] == "b" else ()),
            ]
            for place, label in enumerate(labels)
        ]
        parts.append(_batch(population, taste_LE, batch_idx, labels, by_prompt, shift, rng))
        fields.append(pd.DataFrame({"batch_idx": batch_idx, "in_batch_idx": np.arange(len(labels)), **levels}))
    return concat_counts(parts), pd.concat(fields, ignore_index=True)


def _batch(
    population: Population,
    taste_LE: npt.NDArray[np.float64],
    batch_idx: int,
    labels: Sequence[str],
    planted_of: Sequence[Sequence[Expert]],
    shift: float,
    rng: np.random.Generator,
) -> RoutingCounts:
    counts, num_tokens = [], []
    for label, planted in zip(labels, planted_of, strict=True):
        low, high = population.unsafe_tokens if label == "unsafe" else population.safe_tokens
        num_tokens.append(int(rng.integers(low, high + 1)))
        own_LE = taste_LE + population.own_taste * rng.standard_normal(taste_LE.shape)
        routed_TLE = _route(own_LE, num_tokens[-1], population.num_experts_per_tok, rng)
        for expert in planted:
            _plant(routed_TLE[:, expert.layer], expert.expert, shift, rng)
        counts.append(routed_TLE.sum(axis=0, dtype=np.int32))
    num = len(labels)
    return RoutingCounts(
        batch_idx=np.full(num, batch_idx),
        in_batch_idx=np.arange(num),
        label=np.array(labels, dtype=object),
        category=np.full(num, "", dtype=object),
        role=np.full(num, "prompt", dtype=object),
        num_tokens=np.array(num_tokens),
        counts_NLE=np.stack(counts),
        layers=tuple(range(population.num_layers)),
        num_experts_per_tok=population.num_experts_per_tok,
    )


def _route(
    logits_LE: npt.NDArray[np.float64], num_tokens: int, num_experts_per_tok: int, rng: np.random.Generator
) -> npt.NDArray[np.bool_]:
    """(T, L, E): each token's experts, drawn without replacement with the softmax as weights (Gumbel top-k)."""
    noisy_TLE = logits_LE + rng.gumbel(size=(num_tokens, *logits_LE.shape))
    last = noisy_TLE.shape[2] - num_experts_per_tok
    chosen_TLK = np.argpartition(noisy_TLE, last, axis=2)[:, :, last:]
    routed_TLE = np.zeros(noisy_TLE.shape, dtype=bool)
    np.put_along_axis(routed_TLE, chosen_TLK, True, axis=2)
    return routed_TLE


def _plant(routed_TE: npt.NDArray[np.bool_], expert: int, shift: float, rng: np.random.Generator) -> None:
    """Routes a further share `shift` of the tokens to the expert, each instead of one of those it had."""
    free = np.flatnonzero(~routed_TE[:, expert])
    wanted = min(len(free), rng.binomial(len(routed_TE), shift))
    for token in rng.choice(free, size=wanted, replace=False):
        routed_TE[token, rng.choice(np.flatnonzero(routed_TE[token]))] = False
        routed_TE[token, expert] = True

"""How often identification's statistics are wrong where nothing is to be found, and how often they find what is there.

python benchmarks/false_alarms.py alarms      null batches with any maxT p <= 0.05, by the make-up of the batch
python benchmarks/false_alarms.py power       batches in which one planted expert has a maxT p <= 0.05
python benchmarks/false_alarms.py coverage    intervals of 95% that hold the true difference

Each is printed for the standard error about one rate of all prompts, which tests divided by before, for the one about each
label's own rate, and for what is done now: own rates, and with unlike numbers of prompts the larger p of both. Intervals
have degrees of freedom by number of prompts, as before, or by how these share the tokens.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from moe_ray.identification.permutation_test import permutation_test
from moe_ray.identification.relabelling_counts import count_relabellings
from moe_ray.identification.relabellings import canonical_order, relabellings
from moe_ray.identification.samples import Samples
from moe_ray.identification.significance import cluster_interval, standard_error
from moe_ray.identification.studentised import Studentised, about_one_rate, studentised

LAYERS, EXPERTS, PER_TOKEN = 4, 16, 2
LEVEL = 0.05


@dataclass(frozen=True)
class MakeUp:
    """A batch: prompts of each label, and their mean tokens."""

    safe: int
    safe_tokens: int
    unsafe: int
    unsafe_tokens: int

    def __str__(self) -> str:
        return f"{self.safe} x {self.safe_tokens} safe, {self.unsafe} x {self.unsafe_tokens} unsafe"


NULL = [
    MakeUp(8, 30, 8, 30),
    MakeUp(8, 20, 8, 80),
    MakeUp(8, 20, 8, 200),
    MakeUp(12, 30, 4, 30),
    MakeUp(10, 20, 6, 80),
    MakeUp(24, 20, 8, 80),
    MakeUp(12, 20, 4, 80),
    MakeUp(4, 80, 12, 20),
    MakeUp(4, 20, 12, 80),
    MakeUp(12, 80, 4, 20),
    MakeUp(24, 80, 8, 20),
    MakeUp(6, 20, 10, 80),
]
WITH_POWER = [MakeUp(8, 30, 8, 30), MakeUp(8, 20, 8, 80), MakeUp(12, 30, 4, 30), MakeUp(12, 20, 4, 80)]
COVERED = [MakeUp(8, 30, 8, 30), MakeUp(24, 30, 8, 30), MakeUp(4, 30, 12, 30), MakeUp(12, 30, 4, 30)]


def batch(rng: np.random.Generator, make_up: MakeUp, lengths: str, *, planted: float = 0.0) -> Samples:
    """Prompts of one population: each has a taste of its own around a common one; lengths do not depend on it.

    Args:
        rng: of the prompts.
        make_up: numbers and mean lengths.
        lengths: equal; spread = evenly within half of the mean; heavy-tailed = lognormal, of standard deviation 1.
        planted: added to the unsafe prompts' logit of one expert.
    """
    mean_N = np.repeat([make_up.safe_tokens, make_up.unsafe_tokens], [make_up.safe, make_up.unsafe]).astype(float)
    num = len(mean_N)
    if lengths == "equal":
        tokens_N = mean_N.astype(int)
    elif lengths == "spread":
        tokens_N = rng.integers(mean_N * 0.5, mean_N * 1.5 + 1)
    else:
        tokens_N = np.maximum(2, np.round(mean_N * np.exp(rng.standard_normal(num) - 0.5))).astype(int)
    is_unsafe_N = np.arange(num) >= make_up.safe
    taste_LE = 0.7 * np.random.default_rng(5).standard_normal((LAYERS, EXPERTS))
    logits_NLE = taste_LE + 0.5 * rng.standard_normal((num, LAYERS, EXPERTS))
    logits_NLE[is_unsafe_N, 0, 3] += planted
    rates_NLE = np.exp(logits_NLE)
    rates_NLE /= rates_NLE.sum(axis=2, keepdims=True)
    counts_NX = rng.multinomial(tokens_N[:, None] * PER_TOKEN, rates_NLE).reshape(num, LAYERS * EXPERTS)
    return Samples.of(counts_NX, tokens_N, is_unsafe_N)


def p_maxt_of(samples: Samples, make: Callable[..., Studentised]) -> np.ndarray:
    """(X,) maxT p of one statistic alone."""
    order, strata = canonical_order(samples.is_unsafe_N, samples.groups_N)
    labels = relabellings(strata, 20_000, 0)
    counts = count_relabellings(make(samples, labels, order), labels)
    return (labels.num - np.searchsorted(np.sort(counts.maxima_P), counts.bound_X)) / labels.num


def alarms(args: argparse.Namespace) -> pd.DataFrame:
    """Share of null batches in which any expert passes."""
    return _shares(args, NULL, lambda p_X: p_X.min(), planted=0.0)


def power(args: argparse.Namespace) -> pd.DataFrame:
    """Share of batches in which the planted expert passes."""
    return _shares(args, WITH_POWER, lambda p_X: p_X[3], planted=args.shift)


def _shares(args: argparse.Namespace, make_ups: list[MakeUp], looked_at, *, planted: float) -> pd.DataFrame:
    rows = []
    for make_up in make_ups:
        for lengths in ("spread", "heavy-tailed"):
            rng, passed = np.random.default_rng(1), np.zeros(3)
            for _ in range(args.batches):
                samples = batch(rng, make_up, lengths, planted=planted)
                p_maxt = [p_maxt_of(samples, make) for make in (about_one_rate, studentised)]
                passed += [looked_at(p_X) <= LEVEL for p_X in (*p_maxt, permutation_test(samples).p_maxt_X)]
            rows.append((str(make_up), lengths, *passed / args.batches))
            print(".", end="", flush=True, file=sys.stderr)
    columns = ["prompts x mean tokens", "lengths", "about one rate (before)", "about own rates", "now"]
    return pd.DataFrame(rows, columns=columns)


def interval_by_number(samples: Samples) -> tuple[np.ndarray, np.ndarray]:
    """The interval before: a label has one degree of freedom less than prompts, however they share its tokens."""
    variance_X, weighted_X = 0.0, 0.0
    for rows in (samples.is_unsafe_N, ~samples.is_unsafe_N):
        num, residuals_NX = rows.sum(), samples.residuals()[rows] / samples.sizes_N[rows].sum()
        part_X = num / (num - 1) * np.square(residuals_NX).sum(axis=0)
        variance_X, weighted_X = variance_X + part_X, weighted_X + part_X**2 / (num - 1)
    half_X = stdtrit(variance_X**2 / weighted_X, 0.975) * standard_error(samples)
    return samples.difference() - half_X, samples.difference() + half_X


def coverage(args: argparse.Namespace) -> pd.DataFrame:
    """Share of intervals of null batches that hold 0, over batches and experts."""
    rows = []
    for make_up in COVERED:
        for lengths in ("equal", "spread", "heavy-tailed"):
            rng, held = np.random.default_rng(1), np.zeros(2)
            for _ in range(args.batches):
                samples = batch(rng, make_up, lengths)
                ends = interval_by_number(samples), cluster_interval(samples)
                held += [np.mean((low <= 0) & (high >= 0)) for low, high in ends]
            rows.append((str(make_up), lengths, *held / args.batches))
    return pd.DataFrame(rows, columns=["prompts x mean tokens", "lengths", "by number (before)", "by share of tokens"])


def main() -> int:
    """Prints one table, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    functions = {function.__name__: function for function in (alarms, power, coverage)}
    parser.add_argument("what", nargs="*", default=list(functions), help=f"of {', '.join(functions)} (default: all)")
    parser.add_argument("--batches", type=int, default=300, help="of each make-up (default: %(default)s)")
    parser.add_argument(
        "--shift", type=float, default=1.8, help="of the planted logit, for power (default: %(default)s)"
    )
    args = parser.parse_args()
    for name in args.what:
        table = functions[name](args)
        print(f"\n{name}: {args.batches} batches of each make-up, {LAYERS} layers x {EXPERTS} experts")
        print(table.to_string(index=False, float_format="{:.3f}".format))
    return 0


if __name__ == "__main__":
    sys.exit(main())

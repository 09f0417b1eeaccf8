"""Checks our rates, differences and selection against a published table of routing counts.

    python benchmarks/check_published.py steermoe_olmoe_safety.csv

The table is SteerMoE's (adobe-research/SteerMoE) for OLMoE-1B-7B-0125-Instruct: `a1, d1` tokens routed and not routed to
an expert in behaviour 1, `a2, d2` in behaviour 2, the rates `a1_n, a2_n` and their difference. It is not part of moe-ray.
"""

from __future__ import annotations

import argparse
import sys

import pandas as pd

from moe_ray.identification.risk import add_rates
from moe_ray.identification.selection import top_experts

TOLERANCE = 1e-12
TOP_K = 50


def published_as_ours(published: pd.DataFrame) -> pd.DataFrame:
    """The same counts under our names; behaviour 1 takes the place of unsafe, since the difference is 1 less 2."""
    counts = published[["layer", "expert", "a1", "d1", "a2", "d2"]].astype("int64")
    return counts.rename(columns={"a1": "a_unsafe", "d1": "d_unsafe", "a2": "a_safe", "d2": "d_safe"})


def main() -> int:
    """Prints the comparison; returns 0 when all of it holds, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", help="the published table")
    published = pd.read_csv(parser.parse_args().csv)
    ours = add_rates(published_as_ours(published))
    checks = []
    for theirs, name in (("a1_n", "a_unsafe_n"), ("a2_n", "a_safe_n"), ("risk_diff", "risk_diff")):
        worst = float((published[theirs] - ours[name]).abs().max())
        checks.append((f"{name}: largest distance from the published {theirs}", f"{worst:.1e}", worst <= TOLERANCE))
    by_value = top_experts(ours, threshold=0.05, top_k=TOP_K)
    ordered = published.sort_values(["layer", "expert"])
    above = ordered[ordered["risk_diff"] > 0.05]
    first_rows = set(zip(above["layer"][:TOP_K], above["expert"][:TOP_K], strict=True))
    shared = len(first_rows & set(by_value))
    checks.append(
        (f"top {TOP_K} by value that are also among the first {TOP_K} rows in layer order", str(shared), shared < TOP_K)
    )
    shuffled = top_experts(ours.sample(frac=1, random_state=0), threshold=0.05, top_k=TOP_K)
    checks.append(("selection is the same with the rows shuffled", str(shuffled == by_value), shuffled == by_value))
    sums = float(ours.groupby("layer")["risk_diff"].sum().abs().max())
    checks.append(("largest sum of differences within a layer", f"{sums:.1e}", sums < 1e-9))
    print(f"{len(ours)} experts in {ours['layer'].nunique()} layers; strongest: {', '.join(map(str, by_value[:5]))}")
    print(pd.DataFrame(checks, columns=["check", "value", "holds"]).to_string(index=False))
    return 0 if all(holds for *_, holds in checks) else 1


if __name__ == "__main__":
    sys.exit(main())

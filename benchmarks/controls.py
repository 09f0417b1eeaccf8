"""How much survives the control for topic and for template: experts that follow one of them alone, harm alone, or nothing.

    python benchmarks/controls.py [BATCHES]

Batches of 12 safe and 12 unsafe prompts, of which 9 unsafe ones are about topic b and 9 safe ones about topic a, templates
alike; an expert that follows something is routed for a further share of those tokens. Printed is the share of planted
experts that a plain rule would select (risk difference above 0.05), and of those that survive either control.
"""

from __future__ import annotations

import sys
from typing import Any

import pandas as pd

from moe_ray.config.identify import IdentifyConfig
from moe_ray.experts import Expert
from moe_ray.identification.controls import controls_of_batches
from moe_ray.testing.simulated_counts import Population, simulate_confounded

PLANTED = (Expert(0, 3), Expert(2, 7))
POPULATION = Population()


def row(follows: str, shift: float, num_batches: int) -> dict[str, Any]:
    """Shares of planted experts, over all batches."""
    planted = {} if follows == "nothing" else {f"by_{follows}": PLANTED}
    counts, fields = simulate_confounded(POPULATION, num_batches=num_batches, shift=shift, **planted)
    config = IdentifyConfig(roles=("prompt",), weighting="tokens")
    table = controls_of_batches(counts, fields, dict.fromkeys(range(num_batches), PLANTED), config)
    shares: dict[str, Any] = {"follows": follows, "shift": shift}
    of_topic = table[table["factor"] == "topic"]
    shares["would be selected"] = float((of_topic["risk_diff"] > config.threshold).mean())
    for factor in ("topic", "template"):
        shares[f"survives {factor}"] = float(table.loc[table["factor"] == factor, "survives"].mean())
    return shares


def main() -> None:
    """Prints the table."""
    num_batches = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    cases = [("nothing", 0.0)] + [(name, shift) for name in ("topic", "template", "harm") for shift in (0.2, 0.4)]
    print(pd.DataFrame([row(name, shift, num_batches) for name, shift in cases]).to_string(index=False))


if __name__ == "__main__":
    main()

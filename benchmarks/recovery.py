"""How well each selection rule finds the experts that were planted in models with a known answer.

python benchmarks/recovery.py                         kinds planted and late, seeds 0 to 2, every rule
python benchmarks/recovery.py --kinds late --seeds 1  some

Organisms are built once, in the cache of the repository (`.cache`), a minute each. Of each batch of 8 safe and 8 unsafe
training prompts with the answers that the model gives, a rule selects experts and ranks all of them. Printed for each kind
and rule, as means over batches with 95% intervals over categories and seeds (a batch's category in one model is a cluster,
since batches of it share requests):

    precision, recall     of the selection, against the planted experts of the batch's category
    average precision     of the whole ranking: 1 = the planted experts come first
    rank                  of a planted expert, of all experts
    decoys                share of the decoys that is selected: routed on the same prompts, and without any effect
    selected              experts of a batch
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from moe_ray import pipeline
from moe_ray.config.identify import IdentifyConfig
from moe_ray.config.model import ModelConfig
from moe_ray.demo.examples import embedded_records
from moe_ray.evaluation.mean_intervals import clustered_mean
from moe_ray.experts import ExpertMasks
from moe_ray.models.loading import load_model, load_tokenizer
from moe_ray.organisms import KINDS, OrganismRecipe, Truth, build_embedded, read_truth
from moe_ray.organisms.recovery import average_precision, ranks_of, recovery
from moe_ray.prompts.batches import Batch, assemble_batches
from moe_ray.prompts.examples import records_to_examples
from moe_ray.routing.counts import RoutingCounts

ROOT = Path(__file__).resolve().parents[1]
WITH_CAUSE = ("planted", "late")


class Rule(NamedTuple):
    """A way to select experts: settings of identification, and the column of the risk table that it ranks by."""

    settings: Mapping[str, Any]
    column: str = "risk_diff"


RULES = {
    "risk difference, prompt tokens": Rule({}),
    "risk difference, prompt and response": Rule({"roles": ("prompt", "response")}),
    "risk difference, response tokens": Rule({"roles": ("response",)}),
    "activation-weighted, prompt tokens": Rule({"weighting": "activation"}, "risk_diff_activation"),
    "activation-weighted, response tokens": Rule(
        {"weighting": "activation", "roles": ("response",)}, "risk_diff_activation"
    ),
    "ESFT token, prompt tokens": Rule({"rule": "esft_token"}, "a_unsafe_n"),
    "ESFT token, response tokens": Rule({"rule": "esft_token", "roles": ("response",)}, "a_unsafe_n"),
}
"""The rules compared, by the name that they are printed with."""


class Captured(NamedTuple):
    """An organism, what is true of it, and the routing of its batches."""

    truth: Truth
    counts: RoutingCounts
    categories: dict[int, str]


def training_batches(seed: int) -> list[Batch]:
    """Batches of the shipped training prompts, each with the answer that organisms give."""
    return list(assemble_batches(records_to_examples(embedded_records("train")), seed=seed).batches)


def captured(kind: str, seed: int) -> Captured:
    """An organism's routing, which is built first where it is not in the cache."""
    folder = build_embedded(ROOT / ".cache", seed=seed, recipe=OrganismRecipe(kind=kind), progress=_shown(kind, seed))
    config = ModelConfig(path=str(folder))
    model, tokenizer = load_model(config, device="cpu"), load_tokenizer(config)
    batches = training_batches(seed)
    counts = pipeline.capture(model, tokenizer, batches, weights=True)
    return Captured(read_truth(folder), counts, {batch.batch_idx: batch.category for batch in batches})


def figures(organism: Captured, rule: Rule) -> Iterator[dict[str, Any]]:
    """What a rule made of each batch."""
    config = IdentifyConfig(permutations=0, resamples=0, **rule.settings)
    found = pipeline.identify(organism.counts, config=config)
    tables = dict(iter(found.risk.groupby("batch_idx")))
    for batch_idx in found.masks.batch_idx:
        yield _figures(organism, rule, found.masks, batch_idx, tables[batch_idx])


def _figures(organism: Captured, rule: Rule, masks: ExpertMasks, batch_idx: int, table: pd.DataFrame) -> dict[str, Any]:
    category = organism.categories[batch_idx]
    planted_LE = organism.truth.planted_mask(category)
    alone = {name: value for name, value in organism.categories.items() if name == batch_idx}
    found = recovery(organism.truth, masks, alone)
    scores_LE = table.sort_values(["layer", "expert"])[rule.column].to_numpy().reshape(planted_LE.shape)
    return {
        "category": category,
        "precision": found["precision"],
        "recall": found["recall"],
        "average precision": average_precision(scores_LE, planted_LE),
        "rank": float(ranks_of(scores_LE, planted_LE).mean()),
        "decoys": found["decoys_selected"] / found["decoys"],
        "selected": found["selected"],
    }


def summary(rows: pd.DataFrame) -> pd.Series:
    """Means over batches, with 95% intervals over a category's batches in one model as clusters."""
    clusters = rows.groupby(["seed", "category"]).ngroup()
    shown = {}
    for name in ("precision", "recall", "average precision", "rank", "decoys", "selected"):
        known = rows[name].notna()
        mean = clustered_mean(rows.loc[known, name].to_numpy(dtype=float), clusters=clusters[known].to_numpy())
        shown[name] = (
            f"{mean.value:.2f} [{mean.low:.2f}, {mean.high:.2f}]" if name != "selected" else f"{mean.value:.1f}"
        )
    return pd.Series(shown)


def _shown(kind: str, seed: int) -> Any:
    def progress(done: int, total: int, loss: float) -> None:
        if done % 50 == 0 or done == total:
            print(f"building {kind}-{seed}: step {done} of {total}, compliance loss {loss:.3f}", file=sys.stderr)

    return progress


def main(arguments: list[str]) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=WITH_CAUSE, default=list(WITH_CAUSE))
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on")
    parser.add_argument("--rules", nargs="+", choices=RULES, metavar="RULE", default=list(RULES))
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    rows = []
    for kind in asked.kinds:
        for seed in range(asked.seeds):
            organism = captured(kind, seed)
            for name in asked.rules:
                rows += [{"kind": kind, "seed": seed, "rule": name, **row} for row in figures(organism, RULES[name])]
    table = pd.DataFrame(rows)
    for kind in asked.kinds:
        print(f"\n{kind}: {KINDS[kind]}; {asked.seeds} seeds")
        of_kind = table[table["kind"] == kind]
        shown = {name: summary(of_kind[of_kind["rule"] == name]) for name in asked.rules}
        print(pd.DataFrame(shown).T.to_string())


if __name__ == "__main__":
    main(sys.argv[1:])

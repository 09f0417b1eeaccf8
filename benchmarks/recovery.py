"""How well selection rules and the causal check do on models with a known answer.

python benchmarks/recovery.py rules                         kinds planted and late, seeds 0 to 2, every rule
python benchmarks/recovery.py rules --kinds late --seeds 1  some
python benchmarks/recovery.py null                          how often a cause is shown where there is none
python benchmarks/recovery.py knock-outs                    what refuses without its planted experts, or its decoys

Organisms are built once, in the cache of the repository (`.cache`), a minute each where nothing else runs.

`rules`: of each batch of 8 safe and 8 unsafe training prompts with the answers that the model gives, a rule selects experts
and ranks all of them. Printed for each kind and rule, as means over batches with 95% intervals over categories and seeds:
the batches of a category in one model are a cluster, since they share requests.

    precision, recall     of the selection, against the planted experts of the batch's category
    average precision     of the whole ranking: 1 = the planted experts come first
    rank                  of a planted expert, of all experts
    decoys                share of the decoys that is selected: routed on the same prompts, and without any effect
    selected              experts of a batch

`null`: the share of batches that the causal check calls causal, and its verdict over all of them, in `spread` and
`attention`, and in `planted` with the labels of each batch's prompts shuffled; then in `planted` as it is, where it should.
Held-out prompts are asked, with labels shuffled within a category where those of batches are; for shuffled labels also the
prompts that chose the experts, which is what the check avoids where it can.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_ray import pipeline
from moe_ray.config.identify import SCORES_OF_RULE, IdentifyConfig
from moe_ray.config.model import ModelConfig
from moe_ray.demo.examples import embedded_records
from moe_ray.evaluation.intervals import clustered_mean
from moe_ray.experts import ExpertMasks
from moe_ray.identification.selection import ranking_column
from moe_ray.models.loading import load_model, load_tokenizer
from moe_ray.organisms import KINDS, OrganismRecipe, Truth, build_embedded, read_truth
from moe_ray.organisms.knock_outs import knock_out_table
from moe_ray.organisms.recovery import average_precision, ranks_of, recovery
from moe_ray.prompts.batches import Batch, assemble_batches
from moe_ray.prompts.examples import records_to_examples
from moe_ray.routing.counts import RoutingCounts

ROOT = Path(__file__).resolve().parents[1]
WITH_CAUSE = ("planted", "late")
_ASKED = {
    "held out": "held out",
    "shuffled": "held out, all labels shuffled",
    "shuffled, own": "those that chose the experts, labels shuffled",
}


class Rule(NamedTuple):
    """A way to select experts: settings of identification."""

    settings: Mapping[str, Any]


_TOKENS = {"weighting": "tokens"}
_PROMPT, _RESPONSE = {"roles": ("prompt",)}, {"roles": ("response",)}

RULES = {
    "risk difference, prompt tokens": Rule({**_TOKENS, **_PROMPT}),
    "risk difference, prompt and response": Rule({**_TOKENS, "roles": ("prompt", "response")}),
    "risk difference, response tokens": Rule({**_TOKENS, **_RESPONSE}),
    "risk difference by weight, prompt tokens": Rule({"weighting": "activation", **_PROMPT}),
    "risk difference by weight, response tokens": Rule({"weighting": "activation", **_RESPONSE}),
    "comply versus refuse, same prompts": Rule({"rule": "comply_refuse"}),
    "attribution |w dL/dw| of the answer": Rule({"rule": "attribution"}),
    "gate attribution of the answer": Rule({"rule": "gate"}),
    "gate attribution, comply versus refuse": Rule({"rule": "gate_refuse"}),
    "REAP saliency, prompt tokens": Rule({"rule": "reap", **_PROMPT}),
    "REAP saliency, response tokens": Rule({"rule": "reap", **_RESPONSE}),
    "MoE-Sieve, top routed, prompt tokens": Rule({"rule": "top_routed", **_PROMPT}),
    "ESFT token, prompt tokens": Rule({"rule": "esft_token", **_PROMPT}),
    "ESFT token, response tokens": Rule({"rule": "esft_token", **_RESPONSE}),
}
"""The rules compared, by the name that they are printed with."""


class Captured(NamedTuple):
    """An organism, what is true of it, and the routing of its batches."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    truth: Truth
    batches: list[Batch]
    counts: RoutingCounts
    categories: dict[int, str]


def built(kind: str, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Truth]:
    """An organism, from the cache or built, and what is true of it."""
    folder = build_embedded(ROOT / ".cache", seed=seed, recipe=OrganismRecipe(kind=kind), progress=_shown(kind, seed))
    config = ModelConfig(path=str(folder))
    return load_model(config, device="cpu"), load_tokenizer(config), read_truth(folder)


def captured(kind: str, seed: int, *, scores: tuple[str, ...] = (), shuffled: bool = False) -> Captured:
    """An organism's routing, which is built first where it is not in the cache.

    Args:
        kind: of organism.
        seed: of organism and batches.
        scores: also measured.
        shuffled: each batch's labels are drawn anew among its prompts.
    """
    model, tokenizer, truth = built(kind, seed)
    batches = list(assemble_batches(records_to_examples(embedded_records("train")), seed=seed).batches)
    if shuffled:
        generator = random.Random(seed)
        batches = [relabelled(batch, generator) for batch in batches]
    counts = pipeline.capture(model, tokenizer, batches, weights=True, scores=scores)
    categories = {batch.batch_idx: batch.category for batch in batches}
    return Captured(model, tokenizer, truth, batches, counts, categories)


def relabelled(batch: Batch, generator: random.Random) -> Batch:
    """The batch with as many unsafe prompts as before, drawn anew among all of its prompts."""
    labels = [example.label for example in batch.examples]
    generator.shuffle(labels)
    examples = [replace(example, label=label) for example, label in zip(batch.examples, labels, strict=True)]
    return replace(batch, examples=tuple(examples))


def figures(organism: Captured, rule: Rule) -> Iterator[dict[str, Any]]:
    """What a rule made of each batch."""
    config = IdentifyConfig(permutations=0, resamples=0, **rule.settings)
    found = pipeline.identify(organism.counts, config=config)
    tables = dict(iter(found.risk.groupby("batch_idx")))
    for batch_idx in found.masks.batch_idx:
        yield _figures(organism, ranking_column(config), found.masks, batch_idx, tables[batch_idx])


def _figures(
    organism: Captured, column: str, masks: ExpertMasks, batch_idx: int, table: pd.DataFrame
) -> dict[str, Any]:
    category = organism.categories[batch_idx]
    planted_LE = organism.truth.planted_mask(category)
    alone = {name: value for name, value in organism.categories.items() if name == batch_idx}
    found = recovery(organism.truth, masks, alone)
    scores_LE = table.sort_values(["layer", "expert"])[column].to_numpy().reshape(planted_LE.shape)
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


def causes_shown(organism: Captured, held_out: Sequence[Mapping[str, Any]]) -> tuple[int, int, str]:
    """Batches in which the selected experts are called causal, batches checked, and the verdict over all of them."""
    found = pipeline.identify(organism.counts, config=IdentifyConfig(permutations=0, resamples=0))
    ablation = pipeline.ablate(
        *(organism.model, organism.tokenizer, organism.batches, found.masks, found.risk),
        held_out=records_to_examples(held_out), max_batches=0, leave_one_out=0, curve=0, forced=False, generate=False,
    )  # fmt: skip
    verdicts = ablation.batches["verdict"]
    return int((verdicts == "causal").sum()), len(verdicts), ablation.verdict


def with_shuffled_labels(records: Sequence[Mapping[str, Any]], generator: random.Random) -> list[dict[str, Any]]:
    """The records of each category with its labels drawn anew among them."""
    shuffled = []
    for category in sorted({record["category"] for record in records}):
        rows = [record for record in records if record["category"] == category]
        labels = [record["label"] for record in rows]
        generator.shuffle(labels)
        shuffled += [{**record, "label": label} for record, label in zip(rows, labels, strict=True)]
    return shuffled


def print_rules(kinds: Sequence[str], seeds: int, rules: Sequence[str]) -> None:
    """Prints the table of rules."""
    needed = {score for name in rules for score in SCORES_OF_RULE.get(RULES[name].settings.get("rule", ""), ())}
    rows = []
    for kind in kinds:
        for seed in range(seeds):
            organism = captured(kind, seed, scores=tuple(sorted(needed)))
            for name in rules:
                rows += [{"kind": kind, "seed": seed, "rule": name, **row} for row in figures(organism, RULES[name])]
    table = pd.DataFrame(rows)
    for kind in kinds:
        print(f"\n{kind}: {KINDS[kind]}; {seeds} seeds")
        of_kind = table[table["kind"] == kind]
        shown = {name: summary(of_kind[of_kind["rule"] == name]) for name in rules}
        print(pd.DataFrame(shown).T.to_string())


def print_null(seeds: int) -> None:
    """Prints how often a cause is shown where there is none, and where there is one."""
    held_out, rows = embedded_records("test"), []
    cases = (("spread", "held out"), ("attention", "held out"), ("planted", "shuffled"), ("planted", "shuffled, own"))
    for kind, asked in (*cases, ("planted", "held out")):
        found = []
        for seed in range(seeds):
            organism = captured(kind, seed, shuffled=asked != "held out")
            shuffled = with_shuffled_labels(held_out, random.Random(seed)) if asked == "shuffled" else held_out
            found.append(causes_shown(organism, [] if asked == "shuffled, own" else shuffled))
        causal, batches = sum(row[0] for row in found), sum(row[1] for row in found)
        rows.append(
            (kind, _ASKED[asked], batches, causal, f"{causal / batches:.3f}", ", ".join(row[2] for row in found))
        )
    columns = ["model", "prompts asked", "batches", "called causal", "share", "verdict over all batches, by seed"]
    print(pd.DataFrame(rows, columns=columns).to_string(index=False))


def print_knock_outs(kinds: Sequence[str], seeds: int) -> None:
    """Prints the shares of held-out prompts that are refused without experts: mean over categories, least and most."""
    for kind in kinds:
        for seed in range(seeds):
            organism, tokenizer, truth = built(kind, seed)
            table = knock_out_table(organism, tokenizer, truth)
            print(f"\n{kind}, seed {seed}")
            print(table.groupby("without")[["unsafe", "safe"]].agg(["mean", "min", "max"]).round(2).to_string())


def main(arguments: list[str]) -> None:
    """Prints what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rules", "null", "knock-outs"))
    parser.add_argument("--kinds", nargs="+", choices=WITH_CAUSE, default=list(WITH_CAUSE))
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on")
    parser.add_argument("--rules", nargs="+", choices=RULES, metavar="RULE", default=list(RULES))
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if asked.what == "rules":
        print_rules(asked.kinds, asked.seeds, asked.rules)
    elif asked.what == "knock-outs":
        print_knock_outs(asked.kinds, asked.seeds)
    else:
        print_null(asked.seeds)


if __name__ == "__main__":
    main(sys.argv[1:])

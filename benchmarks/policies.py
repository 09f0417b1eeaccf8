"""What each routing policy of training brings at equal budget: refusals, and what is forgotten, over the steps.

    python benchmarks/policies.py
    python benchmarks/policies.py finetune.epochs=4 identify.roles=[prompt,response] --model runs/organism \
        --prompts runs/organism/prompts.jsonl --seeds 0 1 2 --routings natural union masked

Each policy of `finetune.routing`, two that learn from unsafe prompts alone and two whose routers learn too, trains the same
experts on the same batches in the same order for as many steps at the same learning rate, from the same checkpoint. Another
seed draws other batches in another order. After a quarter, half and all of the steps the held-out prompts of the split
`test` are answered under natural routing, and where asked for through the union of the batches' unsafe experts and through
each batch's own.

Differences are to `natural` (where only gradients are kept to the batch's experts), paired by prompt: seeds are averaged
before, and prompts with the same text or of one pair count once. All runs in one process with one thread; steps, not
seconds, are compared. Words KEY=VALUE, which come first, are settings as of `moe-ray`; `--json` gets all figures.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from moe_ray import pipeline
from moe_ray.config.fields import EMBEDDED
from moe_ray.config.finetune import FinetuneConfig
from moe_ray.config.io import load_config
from moe_ray.config.run import Config
from moe_ray.evaluation.evaluate import answer_examples, assign_reference_batches
from moe_ray.evaluation.intervals import clustered_mean, paired_difference
from moe_ray.evaluation.metrics import prompt_clusters
from moe_ray.experts import ExpertMasks, masks_from_experts
from moe_ray.finetuning.adapter import experts_restored
from moe_ray.finetuning.fine_tune import fine_tune, learned_parts
from moe_ray.finetuning.trainer import MaskedTrainer
from moe_ray.models.loading import load_model, load_tokenizer
from moe_ray.models.loss import text_losses
from moe_ray.models.token_budget import TokenBudget
from moe_ray.organisms import build_embedded
from moe_ray.prompts.batches import Batch
from moe_ray.prompts.example_tables import batches_to_frame, examples_to_frame
from moe_ray.prompts.neutral_texts import neutral_texts
from moe_ray.prompts.prompt_set import read_prompts

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = "natural"
POLICIES: Mapping[str, Mapping[str, Any]] = {
    REFERENCE: {"routing": "natural"},
    "masked": {"routing": "masked"},
    "masked_unsafe": {"routing": "masked_unsafe"},
    "masked_prompt": {"routing": "masked_prompt"},
    "masked_response": {"routing": "masked_response"},
    "boosted": {"routing": "boosted", "boost": 2.0},
    "annealed": {"routing": "annealed", "boost": 8.0},
    "masked+unsafe_rows": {"routing": "masked", "learn_from": "unsafe"},
    "natural+unsafe_rows": {"routing": "natural", "learn_from": "unsafe"},
    "natural+routers": {"routing": "natural", "router": "alternating"},
    "masked+routers": {"routing": "masked", "router": "alternating"},
}
"""What each arm changes of the section `finetune`."""

SHARES = (0.25, 0.5, 1.0)
"""Of the steps, after which it is evaluated."""


@dataclass(frozen=True)
class Seed:
    """What all policies of one seed train on."""

    seed: int
    batches: Sequence[Batch]
    masks: ExpertMasks
    test: pd.DataFrame


def drawn(batches: Sequence[Batch], number: int, seed: int) -> list[Batch]:
    """As many batches, drawn category by category in turn, in an order of their own."""
    random = np.random.default_rng(seed)
    of_category: dict[str, list[Batch]] = {}
    for position in random.permutation(len(batches)):
        of_category.setdefault(batches[position].category, []).append(batches[position])
    turns = [
        of_category[name][turn]
        for turn in range(max(map(len, of_category.values())))
        for name in sorted(of_category)
        if turn < len(of_category[name])
    ]
    return turns[:number]


def seeds(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: Config, args: argparse.Namespace
) -> Iterator[Seed]:
    """Batches, masks and held-out prompts of each seed; the prompts are the same for all."""
    asked: list[str] | None = None
    for seed in args.seeds:
        prompts = read_prompts(replace(config, seed=seed))
        batches = drawn(list(prompts.batches), args.batches, seed)
        counts = pipeline.capture(model, tokenizer, batches, config=config.capture, seed=seed)
        found = pipeline.identify(counts, config=config.identify, seed=seed).masks
        selected = {batch.batch_idx: found.selected[batch.batch_idx] for batch in batches}
        masks = masks_from_experts(selected, layers=found.layers, num_experts=found.masks_BLE.shape[2])
        test = examples_to_frame(prompts.test)
        if asked not in (None, test["id"].tolist()):
            sys.exit("the seeds hold out different prompts, which cannot be paired; give prompts with a `split`")
        asked = test["id"].tolist()
        test["batch_idx"] = assign_reference_batches(test, batches_to_frame(batches))
        yield Seed(seed, batches, masks, test)


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: Seed, config: Config
) -> tuple[pd.DataFrame, float]:
    """Judged answers under each routing, and the loss on neutral text (nats per token)."""
    budget = TokenBudget(config.evaluate.tokens_per_forward)
    answers = answer_examples(model, tokenizer, seed.test, config.evaluate, seed.masks, budget=budget)
    neutral = text_losses(model, tokenizer, neutral_texts(config.evaluate.neutral_file), budget=budget)
    return answers, float(neutral["loss"].sum() / neutral["num_tokens"].sum())


def train_and_measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    seed: Seed,
    train: FinetuneConfig,
    config: Config,
) -> Iterator[tuple[float, int, pd.DataFrame, float]]:
    """Yields share, step, answers and neutral loss of a training; the model is as before afterwards."""
    seen = []

    def after_step(trainer: MaskedTrainer, report: object) -> None:
        for share in SHARES:
            if trainer.next_step == max(1, round(share * len(trainer.plan))):
                seen.append((share, trainer.next_step, *measure(model, tokenizer, seed, config)))

    with experts_restored(model, learned_parts(seed.masks, train)):
        fine_tune(model, tokenizer, seed.batches, seed.masks, config=train, seed=seed.seed, after_step=after_step)
    yield from seen


def figures(answers: pd.DataFrame, natural: pd.DataFrame, base: pd.DataFrame) -> dict[str, Any]:
    """One policy against `natural` and against the model before, on the same prompts.

    Args:
        answers: a row per seed and prompt, of one routing and one share of the steps.
        natural: the same of the policy `natural`.
        base: of the model before any training.
    """
    mine, reference, before = (by_prompt(frame) for frame in (answers, natural, base))
    found: dict[str, Any] = {}
    for label in ("unsafe", "safe"):
        rows = mine["label"] == label
        clusters = prompt_clusters(mine[rows]).to_numpy()
        tokens = mine.loc[rows, "target_tokens"].to_numpy()
        for name, weights in (("refused", None), ("loss", tokens)):
            own, other, first = (frame.loc[rows, name].to_numpy() for frame in (mine, reference, before))
            options: dict[str, Any] = {"clusters": clusters, "weights": weights}
            found[f"{label}_{name}"] = clustered_mean(own, **options).as_dict()
            found[f"{label}_{name}_to_natural"] = paired_difference(other, own, **options).as_dict()
            found[f"{label}_{name}_change"] = paired_difference(first, own, **options).as_dict()
    return found


def by_prompt(answers: pd.DataFrame) -> pd.DataFrame:
    """A row per prompt, refusals and losses averaged over seeds, in the order of ids."""
    rows = answers.assign(
        refused=answers["refused"].astype(float), loss=answers["target_loss"] / answers["target_tokens"]
    )
    same = {name: "first" for name in ("label", "messages", "pair", "target_tokens")}
    return rows.groupby("id", sort=True).agg({**same, "refused": "mean", "loss": "mean"})


def compare(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: Config, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Trains every policy with every seed; a row of figures per share of the steps, routing and policy."""
    parts, base_parts = [], []
    for seed in seeds(model, tokenizer, config, args):
        base, base_neutral = measure(model, tokenizer, seed, config)
        base_parts.append(base)
        for policy in args.policies:
            train = replace(config.finetune, **{"boost": 0.0, "num_workers": 1, **POLICIES[policy]})
            for share, step, answers, neutral in train_and_measure(model, tokenizer, seed, train, config):
                about = {"policy": policy, "share": share, "step": step, "neutral_change": neutral - base_neutral}
                parts.append(answers.assign(**about))
            print(f"seed {seed.seed}: {policy}, {step} steps", file=sys.stderr, flush=True)
    measured, base = pd.concat(parts), pd.concat(base_parts)
    rows = []
    for (share, routing, policy), answers in measured.groupby(["share", "routing", "policy"], sort=False):
        of_share = measured[(measured["share"] == share) & (measured["routing"] == routing)]
        natural = of_share[of_share["policy"] == REFERENCE]
        rows.append(
            {
                "share": share,
                "steps": int(answers["step"].iloc[0]),
                "routing": routing,
                "policy": policy,
                "neutral_change": float(answers["neutral_change"].mean()),
                **figures(answers, natural, base[base["routing"] == "natural"]),
            }
        )
    return rows


def interval(figure: Mapping[str, Any], *, points: bool) -> str:
    """Value and interval, of refusals in points."""
    if figure["value"] is None:
        return "–"
    scale, form = (100, ".0f") if points else (1, "+.3f")
    ends = ("value", "low", "high")
    value, low, high = ("–" if figure[name] is None else f"{scale * figure[name]:{form}}" for name in ends)
    return f"{value} [{low}, {high}]"


def table(rows: Sequence[Mapping[str, Any]], share: float, routing: str) -> str:
    """The rows of one share of the steps and one routing, as Markdown."""
    chosen = [row for row in rows if row["share"] == share and row["routing"] == routing]
    lines = [
        f"\nAfter {chosen[0]['steps']} steps, answered under {routing} routing",
        "| policy | unsafe refused, % | points to natural | loss of refusals to natural | safe refused, % | "
        "safe answers, nats forgotten | to natural | neutral text, nats forgotten |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in chosen:
        is_reference = row["policy"] == REFERENCE
        cells = [
            interval(row["unsafe_refused"], points=True),
            "" if is_reference else interval(row["unsafe_refused_to_natural"], points=True),
            "" if is_reference else interval(row["unsafe_loss_to_natural"], points=False),
            interval(row["safe_refused"], points=True),
            interval(row["safe_loss_change"], points=False),
            "" if is_reference else interval(row["safe_loss_to_natural"], points=False),
            f"{row['neutral_change']:+.3f}",
        ]
        lines.append(f"| {row['policy']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table for each share of the steps and each routing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED, help="checkpoint folder or hub name")
    parser.add_argument("--prompts", default=EMBEDDED, help="file of prompts with a `split`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batches", type=int, default=12, help="batches that train, drawn over all categories")
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=list(POLICIES))
    parser.add_argument("--routings", nargs="+", choices=["natural", "union", "masked"], default=["natural"])
    parser.add_argument("--json", type=Path, help="file that gets all figures")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="such as finetune.epochs=2")
    args = parser.parse_intermixed_args(arguments)
    if REFERENCE not in args.policies:
        args.policies = [REFERENCE, *args.policies]
    torch.set_num_threads(1)
    set_verbosity_error()
    disable_progress_bar()
    model_path = build_embedded(ROOT / ".cache") if args.model == EMBEDDED else args.model
    config = load_config(
        None,
        [
            f"model.path={model_path}",
            f"prompts.files=[{args.prompts}]",
            f"evaluate.routing=[{','.join(args.routings)}]",
            # Steps and answers as `workflows/demo.yaml` has them, for the tiny models that this compares on.
            *("finetune.learning_rate=3e-3", "finetune.router_learning_rate=1e-3", "finetune.warmup=0"),
            *args.settings,
        ],
    )
    rows = compare(load_model(config.model, device="cpu"), load_tokenizer(config.model), config, args)
    for share in SHARES:
        for routing in args.routings:
            print(table(rows, share, routing))
    if args.json is not None:
        about = {"model": args.model, "seeds": args.seeds, "batches": args.batches, "settings": args.settings}
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""`moe-ray inspect`: answers questions about the unsafe experts of a finished run, from its run directory alone.

`arguments.QUESTIONS` says what each question is; `ANSWERS` has the function that answers it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from moe_ray.chat_messages import prompt_text
from moe_ray.cli.arguments import QUESTIONS
from moe_ray.errors import InputError
from moe_ray.experts import Expert
from moe_ray.identification.comparisons import is_relative
from moe_ray.identification.confounds import confound_warnings, length_table, weighting_agreement
from moe_ray.identification.overlap import batch_overlap, shared_experts, sweep_union
from moe_ray.identification.pandas_export import export_pickle
from moe_ray.identification.selection import RULES, difference_column, ranking_column, select
from moe_ray.report.ablation_text import ablation_rows, alone_of
from moe_ray.report.certainty_text import certainty_in_words
from moe_ray.report.controls_text import controls_in_words
from moe_ray.report.printable import printable
from moe_ray.report.terminal import print_answer, print_frame
from moe_ray.run_directory import IDENTIFY, RunDirectory, open_run


def run(arguments: argparse.Namespace) -> None:
    """Prints the answers to the questions `ask`, and writes the pickle where `export` names a file.

    Raises:
        InputError: the run has not finished identification, the category is none of its, or the pickle's file exists.
    """
    if arguments.export and Path(arguments.export).exists():
        raise InputError(f"--export: {arguments.export!r} exists; name another file, or remove it first")
    finished = open_run(arguments.run_dir)
    for question in arguments.ask:
        print_answer(f"\n== {question}: {QUESTIONS[question]}")
        ANSWERS[question](finished, arguments)
    if arguments.export:
        export(finished, arguments.export)


def show_certainty(run: RunDirectory, args: argparse.Namespace) -> None:
    """In which batches the selection is significant."""
    head, *sentences = certainty_in_words(run.certainty, run.identify_config)
    print_answer(head)
    show_lines(sentences, args.top)


def show_cause(run: RunDirectory, args: argparse.Namespace) -> None:
    """Whether the unsafe experts are the cause."""
    if run.ablation is None:
        print_answer("not checked; moe-ray ablate checks it")
        return
    print_answer(run.ablation["in_words"])
    if run.ablation["table"]:
        rows = ablation_rows(run.ablation)
        show_table(rows, len(rows))
        show_lines([printable(str(row["in_words"])) for row in run.ablation["per_batch"].values()], args.top)
    if run.ablated_experts is not None and len(run.ablated_experts):
        print_answer(
            "single experts: what unsafe answers lose more than safe ones, where only it is away and where only it stays"
        )
        show_table(run.ablated_experts, args.top)


def show_categories(run: RunDirectory, args: argparse.Namespace) -> None:
    """Which experts answer for a category."""
    known = sorted(run.by_category["category"].unique())
    if args.category is not None and args.category not in known:
        raise InputError(f"--category: got {args.category!r}, expected one of {', '.join(map(printable, known))}")
    for category in known if args.category is None else [args.category]:
        experts = run.by_category[run.by_category["category"] == category]
        print_answer(f"{printable(category)}: {len(experts)} experts are unsafe in at least one of its batches")
        shown = experts.drop(columns=["category", "layer", "expert"])
        if run.ablated_experts is not None:
            ablated = run.ablated_experts[run.ablated_experts["category"] == category]
            shown["lost without it"] = alone_of(shown["name"].tolist(), ablated)
        show_table(shown, args.top)


def show_shared(run: RunDirectory, args: argparse.Namespace) -> None:
    """Which experts belong to several categories."""
    shared = shared_experts(run.by_category)
    print_answer(
        f"{len(shared)} of {len(run.masks.union_experts)} experts of the union belong to more than one category"
    )
    show_table(shared.drop(columns=["layer", "expert"]), args.top)


def show_overlap(run: RunDirectory, args: argparse.Namespace) -> None:
    """How alike the batches' masks are."""
    overlap = batch_overlap(run.masks)
    print_answer(
        f"{len(overlap)} pairs of batches: mean Jaccard {overlap['jaccard'].mean():.2f}, by chance "
        f"{overlap['expected'].mean():.2f}, corrected for chance {overlap['corrected'].mean():.2f}; the most alike:"
    )
    show_table(overlap.sort_values("corrected", ascending=False), args.top)


def show_sweep(run: RunDirectory, args: argparse.Namespace) -> None:
    """What happens to the union when threshold or top_k moves."""
    column, relative = difference_column(run.identify_config), is_relative(run.identify_config)
    what = f"shares of a batch's largest {column} (identify.min_share)" if relative else f"thresholds of {column}"
    print_answer(f"union under other {what} and top_k; kept and added are counted against this run's union")
    table = sweep_union(
        run.risk,
        thresholds=args.thresholds,
        top_ks=args.top_ks,
        reference=run.masks,
        column=column,
        is_relative=relative,
    )
    show_table(table, len(table))


def show_rules(run: RunDirectory, args: argparse.Namespace) -> None:
    """What other rules would choose."""
    rows = []
    for rule in RULES:
        settings: dict[str, Any] = {"rule": rule, "alpha": 0.0, "stability": 0.0}
        selection = replace(run.identify_config, **settings)
        if ranking_column(selection) not in run.risk:
            continue  # It takes what this run did not capture.
        union = select(run.risk, selection, seed=run.config.seed).union
        shared = int((union & run.masks.union).sum())
        rows.append(
            {"rule": rule, "union": int(union.sum()), "in this run's union": shared, "source": RULES[rule].source}
        )
    show_table(pd.DataFrame(rows), len(rows))


def show_confounds(run: RunDirectory, args: argparse.Namespace) -> None:
    """Whether length or template may stand in for harm."""
    examples = run.stored_batches.texts()
    texts = examples[["label"]].assign(text=[prompt_text(json.loads(messages)) for messages in examples["messages"]])
    roles = run.identify_config.roles
    show_lines([f"warning: {line}" for line in confound_warnings(run.counts, texts, roles=roles)] or ["no warning"], 10)
    lengths = length_table(run.counts, roles=roles)
    print_answer(
        f"mean tokens: {lengths['safe_tokens'].mean():.0f} a safe, {lengths['unsafe_tokens'].mean():.0f} an unsafe example"
    )
    agreement = weighting_agreement(run.risk, run.identify_config)
    print_answer(
        f"pooled tokens and equal weight per prompt share {agreement['jaccard'].mean():.0%} of their experts (mean Jaccard)"
    )
    show_table(agreement.sort_values("jaccard"), args.top)
    show_controls(run, args)


def show_controls(run: RunDirectory, args: argparse.Namespace) -> None:
    """What is left of the selection where topic or template is held fixed."""
    if run.controls is None:
        print_answer(
            "no prompt says its topic or template (fields `topic` and `template`), so neither can be controlled for"
        )
        return
    stored = run.manifest(IDENTIFY)
    survival = {} if stored is None else stored["notes"].get("controls", {})
    show_lines(controls_in_words(survival, run.identify_config), args.top)
    for factor, table in run.controls.groupby("factor"):
        names = [str(Expert(layer, expert)) for layer, expert in zip(table["layer"], table["expert"], strict=True)]
        shown = table.assign(expert=names).drop(columns=["factor", "layer"])
        print_answer(
            f"\nwithin {factor}: harm = mean difference inside its levels, effect = of the {factor} inside a label"
        )
        show_table(shown.sort_values("harm", ascending=False), args.top)


ANSWERS: dict[str, Callable[[RunDirectory, argparse.Namespace], None]] = {
    "certainty": show_certainty,
    "cause": show_cause,
    "categories": show_categories,
    "shared": show_shared,
    "overlap": show_overlap,
    "sweep": show_sweep,
    "rules": show_rules,
    "confounds": show_confounds,
}


def show_table(table: pd.DataFrame, rows: int) -> None:
    """Prints the first rows."""
    print_frame(table.head(rows))
    if len(table) > rows:
        print_answer(f"… and {len(table) - rows} more rows (--top)")


def show_lines(lines: Sequence[str], rows: int) -> None:
    """Prints the first lines."""
    print_answer("\n".join(lines[:rows]))
    if len(lines) > rows:
        print_answer(f"… and {len(lines) - rows} more (--top)")


def export(run: RunDirectory, path: str) -> None:
    """Writes the pickle for pandas users."""
    selection = run.identify_config
    export_pickle(
        path,
        masks=run.masks,
        risk=run.risk,
        batches=run.batches,
        model_name=run.config.model.path,
        num_experts_per_tok=run.counts.num_experts_per_tok,
        selection=selection,
    )
    print_answer(f"\nwrote {path}")

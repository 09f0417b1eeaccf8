"""The page: a run's figures, tables and examples in one HTML file that loads nothing.

Prompts, answers and categories are untrusted: Jinja escapes every value, and the page forbids requests and
all scripts but its own, which it names by hash.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from markupsafe import Markup

from moe_ray.config.fields import EMBEDDED
from moe_ray.config.io import flatten
from moe_ray.config.report import ReportConfig
from moe_ray.report.before_after import Block
from moe_ray.report.certainty_text import significance_level
from moe_ray.report.controls_text import controls_in_words, controls_table
from moe_ray.report.format import decimal, rate
from moe_ray.report.html.attacks import attacks_part
from moe_ray.report.html.cause import cause_part
from moe_ray.report.html.examples import answers_part, examples_part
from moe_ray.report.html.experts import certainty_rows, experts_part, maps_part, risk_grids
from moe_ray.report.html.figures import wide_maps
from moe_ray.report.html.first_paragraph import Findings, first_paragraph
from moe_ray.report.html.harness import harness_part
from moe_ray.report.html.headline import headline
from moe_ray.report.html.held_out import held_out_blocks, held_out_parts
from moe_ray.report.html.how_made import how_it_was_made
from moe_ray.report.html.judge import judge_part
from moe_ray.report.html.run_figures import draw_run
from moe_ray.report.html.selected_experts import categories_part, selected_part
from moe_ray.report.html.studies import baselines_part, rounds_part, sweep_part, training_part
from moe_ray.report.html.templates import templates
from moe_ray.report.printable import printable, printable_lines
from moe_ray.report.truth_text import truth_part
from moe_ray.run_directory import CAPTURE, FINETUNE, IDENTIFY, REPORT, RunDirectory


@dataclass(frozen=True, kw_only=True)
class Report:
    """A report.

    Attributes:
        html: the page.
        figures: SVG text by file name without ending.
        lede: its first paragraph.
    """

    html: str
    figures: Mapping[str, str]
    lede: str


def build_report(run: RunDirectory, config: ReportConfig) -> Report:
    """The report of what the run directory holds; parts whose stage was not run are left out."""
    certainty = run.certainty
    blocks = held_out_blocks(run)
    held_out = held_out_parts(blocks)
    grids = risk_grids(run, config)
    drawn = draw_run(run, grids, held_out)
    experts = experts_part(run, grids)
    certain = certainty_rows(run, certainty)
    script = _script()
    lede = first_paragraph(_findings(run, certainty, blocks))
    page = {
        "title": printable(run.folder.url.rstrip("/").rpartition("/")[2]),
        "lede": lede,
        "held_out": held_out,
        "judge": judge_part(run.summary),
        "cause": cause_part(run),
        "attacks": attacks_part(run),
        "harness": harness_part(run),
        "baselines": baselines_part(run),
        "truth": truth_part(run),
        "headline": headline(
            num_union=len(run.masks.union_experts),
            num_experts=int(run.masks.union.size),
            num_batches=len(run.masks.batch_idx),
            before=blocks[0],
            after=blocks[1],
            change=blocks[2],
            ablation=run.ablation,
        ),
        "experts": experts,
        "maps": maps_part(grids, run.masks.layers),
        "wide_maps": wide_maps(run.masks.union.shape[1]),
        "selected": selected_part(run),
        "specificity": categories_part(run),
        "shown_experts": {row["name"] for row in experts["top"]},
        "shown_batches": {row["batch_idx"] for row in certain["rows"]},
        "certainty": certain,
        "controls": _controls(run),
        "level": f"{significance_level(run.identify_config):g}",
        "sweep": sweep_part(run),
        "training": training_part(run),
        "rounds": rounds_part(run),
        "examples": examples_part(run, config.examples),
        "answers": answers_part(run),
        "made": how_it_was_made(run),
        "script": Markup(script),  # our own file; nothing of the run is in it
        "script_hash": "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "settings": {key: printable(str(value)) for key, value in flatten(run.config).items()},
        "stages": _stages(run),
        "figure": lambda name: Markup(drawn[name]),  # our own SVG, its texts escaped by the XML writer
    }
    return Report(html=templates().get_template("page.html.jinja").render(page), figures=drawn, lede=lede)


def _script() -> str:
    return importlib.resources.files("moe_ray.report.html").joinpath("page.js").read_text(encoding="utf-8")


def _findings(run: RunDirectory, certainty: pd.DataFrame, blocks: Sequence[Block]) -> Findings:
    labels = run.stored_batches.columns("label")["label"].value_counts()
    before, after, change = blocks
    captured, tuned = run.manifest(CAPTURE), run.manifest(FINETUNE)
    return Findings(
        model="the embedded model" if run.config.model.path == EMBEDDED else printable(run.config.model.path),
        num_safe=int(labels.get("safe", 0)),
        num_unsafe=int(labels.get("unsafe", 0)),
        num_union=len(run.masks.union_experts),
        num_experts=int(run.masks.union.size),
        certainty=certainty,
        selection=run.identify_config,
        frozen_changed=None if tuned is None else tuned["notes"].get("frozen_parameters_changed"),
        before=before,
        after=after,
        change=change,
        cause="" if run.ablation is None else printable(run.ablation["in_words"]),
        experts_are_copies=captured is not None and bool(captured["notes"].get("experts_are_copies")),
        uniform_loss=(run.summary or {}).get("uniform_loss"),
        against_baselines="" if run.comparison is None else printable_lines(run.comparison[1]),
    )


def _controls(run: RunDirectory) -> dict[str, Any]:
    """What is left of the selection within topics and templates, in words and as rows; empty where neither is known."""
    stored = run.manifest(IDENTIFY)
    survival = {} if stored is None else stored["notes"].get("controls", {})
    if not survival:
        return {}
    rows = controls_table(survival).assign(share=lambda table: [str(rate(value)) for value in table["share"]])
    return {
        "words": controls_in_words(survival, run.identify_config),
        "columns": list(rows.columns),
        "rows": rows.astype(str).to_numpy().tolist(),
    }


def _stages(run: RunDirectory) -> dict[str, Any]:
    manifests = {name: run.manifest(name) for name in run.stages}
    done = {name: manifest for name, manifest in manifests.items() if manifest is not None}
    latest = list(done.values())[-1]["environment"] if done else {}
    seconds = {name: manifest["notes"].get("seconds") for name, manifest in done.items()}
    return {
        "seconds": {name: decimal(number, 2) for name, number in seconds.items()},
        "commit": latest.get("git_commit"),
        "python": latest.get("python"),
        "versions": latest.get("versions", {}),
    }


def write_report(run: RunDirectory, config: ReportConfig) -> Report:
    """Builds the report and writes it to the run directory."""
    report = build_report(run, config)
    run.folder.write_bytes(REPORT, report.html.encode())
    return report

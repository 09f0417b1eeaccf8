"""The page: a run's figures, tables and examples in one HTML file that loads nothing.

Prompts, answers and categories are untrusted: Jinja escapes every value, and the page forbids scripts and requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

from moe_ray.config.fields import EMBEDDED
from moe_ray.config.io import flatten
from moe_ray.config.report import ReportConfig
from moe_ray.identification.identify import certainty_per_batch
from moe_ray.report.html.examples import _examples, _printable_lines
from moe_ray.report.html.experts import _certainty_rows, _experts_part, _limited
from moe_ray.report.html.first_paragraph import Findings, first_paragraph
from moe_ray.report.html.held_out import _held_out, _held_out_part
from moe_ray.report.html.studies import _baselines_part, _rounds_part, _sweep_part, _training_part
from moe_ray.report.printable import printable
from moe_ray.run_directory import FINETUNE, REPORT, RunDirectory


@dataclass(frozen=True, kw_only=True)
class Report:
    """A report.

    Attributes:
        html: the page.
        figures: SVG text by file name without ending.
    """

    html: str
    figures: Mapping[str, str]


def build_report(run: RunDirectory, config: ReportConfig) -> Report:
    """The report of what the run directory holds; parts whose stage was not run are left out."""
    drawn: dict[str, str] = {}
    certainty = certainty_per_batch(run.risk, run.masks, run.identify_config)
    before, after, change = (_held_out(run, when) for when in ("before", "after", "change"))
    findings = _findings(run, certainty, before, after, change)
    page = {
        "title": printable(run.folder.url.rstrip("/").rpartition("/")[2]),
        "lede": first_paragraph(findings),
        "held_out": _held_out_part(drawn, before, after, change),
        "baselines": _baselines_part(run),
        "experts": _experts_part(drawn, run, config),
        "certainty": _limited(_certainty_rows(run, certainty)),
        "sweep": _sweep_part(drawn, run),
        "training": _training_part(drawn, run),
        "rounds": _rounds_part(run),
        "examples": _examples(run, config.examples),
        "settings": {key: printable(str(value)) for key, value in flatten(run.config).items()},
        "stages": _stages(run),
        "figure": lambda name: Markup(drawn[name]),  # our own SVG, its texts escaped by the XML writer
        "figures": drawn,
    }
    return Report(html=_environment().get_template("page.html.jinja").render(page), figures=drawn)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("moe_ray.report.html", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda value: "–" if value is None else f"{value:.1%}"
    environment.filters["number"] = lambda value: "–" if value is None or value != value else f"{value:.3g}"
    return environment


def _findings(run: RunDirectory, certainty: pd.DataFrame, before: Any, after: Any, change: Any) -> Findings:
    labels = run.batches["label"].value_counts()
    tuned = run.manifest(FINETUNE)
    return Findings(
        model="the embedded model" if run.config.model.path == EMBEDDED else printable(run.config.model.path),
        num_safe=int(labels.get("safe", 0)),
        num_unsafe=int(labels.get("unsafe", 0)),
        num_union=len(run.masks.union_experts),
        num_experts=int(run.masks.union.size),
        certainty=certainty,
        selection=run.identify_config,
        routing=run.config.finetune.routing,
        frozen_changed=None if tuned is None else tuned["notes"].get("frozen_parameters_changed"),
        before=before,
        after=after,
        change=change,
        against_baselines="" if run.comparison is None else _printable_lines(run.comparison[1]),
    )


def _stages(run: RunDirectory) -> dict[str, Any]:
    manifests = {name: run.manifest(name) for name in run.stages}
    done = {name: manifest for name, manifest in manifests.items() if manifest is not None}
    latest = list(done.values())[-1]["environment"] if done else {}
    return {
        "seconds": {name: manifest["notes"].get("seconds") for name, manifest in done.items()},
        "commit": latest.get("git_commit"),
        "python": latest.get("python"),
        "versions": latest.get("versions", {}),
    }


def write_report(run: RunDirectory, config: ReportConfig) -> Report:
    """Builds the report and writes it to the run directory."""
    report = build_report(run, config)
    run.folder.write_bytes(REPORT, report.html.encode())
    return report

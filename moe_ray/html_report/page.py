"""The page: a run's figures, tables and examples in one HTML file that loads nothing.

Prompts, answers and categories are untrusted: Jinja escapes every value, and the page forbids scripts and requests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup

from moe_ray.config import EMBEDDED, ReportConfig
from moe_ray.config_io import flatten
from moe_ray.explore import batch_overlap, shared_experts, sweep_union
from moe_ray.export import prompt_text
from moe_ray.finished_run import FinishedRun
from moe_ray.heat_map import map_of_trials
from moe_ray.html_report import figures
from moe_ray.html_report.words import Findings, first_paragraph
from moe_ray.identification import certainty_per_batch
from moe_ray.moe_layers import Expert
from moe_ray.rates import rate
from moe_ray.report import printable
from moe_ray.risk import aggregate_risk
from moe_ray.search_space import read_space

REPORT = "report.html"

_TOP_EXPERTS, _BATCHES_IN_SIGHT, _MOST_BATCHES_COMPARED, _MOST_ROWS = 20, 6, 120, 200
_TOP_KS = (10, 25, 50, 100)
_RATES = (("unsafe_refusal_rate", "refused, unsafe prompts"), ("safe_refusal_rate", "refused, safe prompts"))
_LOSSES = (("target_loss", "loss on target responses"), ("neutral_loss", "loss on neutral text"))


@dataclass(frozen=True, kw_only=True)
class Report:
    """A report.

    Attributes:
        html: the page.
        figures: SVG text by file name without ending.
    """

    html: str
    figures: Mapping[str, str]


def build_report(run: FinishedRun, config: ReportConfig) -> Report:
    """The report of what the run directory holds; parts whose stage was not run are left out."""
    drawn: dict[str, str] = {}
    certainty = certainty_per_batch(run.risk, run.masks, run.selection)
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
        loader=jinja2.PackageLoader("moe_ray.html_report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda value: "–" if value is None else f"{value:.1%}"
    environment.filters["number"] = lambda value: "–" if value is None or value != value else f"{value:.3g}"
    return environment


def _held_out(run: FinishedRun, when: str) -> Mapping[str, Any] | None:
    """Figures of the held-out evaluation `before` or `after`, or their paired `change`."""
    if run.summary is not None:
        found: Mapping[str, Any] | None = run.summary.get(when)
        return found
    stage, key = ("after", "change") if when == "change" else (when, "metrics")
    manifest = run.manifest(f"evaluation_{stage}")
    return None if manifest is None else manifest["notes"].get(key)


def _findings(run: FinishedRun, certainty: pd.DataFrame, before: Any, after: Any, change: Any) -> Findings:
    labels = run.batches["label"].value_counts()
    tuned = run.manifest("experts")
    return Findings(
        model="the embedded model" if run.config.model.path == EMBEDDED else printable(run.config.model.path),
        num_safe=int(labels.get("safe", 0)),
        num_unsafe=int(labels.get("unsafe", 0)),
        num_union=len(run.masks.union_experts),
        num_experts=int(run.masks.union.size),
        certainty=certainty,
        selection=run.selection,
        routing=run.config.train.routing,
        frozen_changed=None if tuned is None else tuned["notes"].get("frozen_parameters_changed"),
        before=before,
        after=after,
        change=change,
        against_baselines="" if run.baselines is None else _printable_lines(run.baselines[1]),
    )


def _held_out_part(drawn: dict[str, str], before: Any, after: Any, change: Any) -> list[dict[str, Any]]:
    """For every kind of routing that was evaluated, a table and charts."""
    if before is None and after is None:
        return []
    parts: list[dict[str, Any]] = []
    for name, title in (
        ("natural", "Natural routing"),
        ("masked", "Routed through each batch's mask"),
    ):
        blocks = [block and block.get("masked") if name == "masked" else block for block in (before, after, change)]
        if not any(blocks[:2]):
            continue
        rows = [_row(title, key, blocks) for key, title in (*_RATES, *_LOSSES)]
        rows = [row for row in rows if row["before"] or row["after"]]
        rates = [row for row in rows if row["is_rate"]]
        overall = f"before_after_{name}"
        drawn[overall] = figures.before_after(overall, f"Refusal rates, {title}", rates, what="refused")
        by_category = _by_category(drawn, name, blocks)
        shown = {"title": title, "rows": rows, "overall": overall, "per_category": by_category}
        parts.append({**shown, "is_first": not parts})
    return parts


def _row(title: str, key: str, blocks: Sequence[Any]) -> dict[str, Any]:
    before, after, change = ((block or {}).get(key) for block in blocks)
    return {
        "name": title,
        "before": before,
        "after": after,
        "change": change,
        "is_rate": key in dict(_RATES),
    }


def _by_category(drawn: dict[str, str], routing: str, blocks: Sequence[Any]) -> list[dict[str, Any]]:
    """Per label a chart and a table of the categories' rates."""
    known = [(block or {}).get("per_category") or {} for block in blocks]
    names = sorted(known[0].keys() | known[1].keys())
    if len(names) < 2:
        return []
    parts = []
    for key, title in _RATES:
        rows = [{**_row(name, key, [block.get(name) for block in known]), "name": printable(name)} for name in names]
        rows = [row for row in rows if any(row[when] and row[when]["n"] for when in ("before", "after"))]
        if rows:
            figure = f"{key}_{routing}_by_category"
            drawn[figure] = figures.before_after(figure, f"{title} by category", rows, what=title)
            parts.append({"title": title, "figure": figure, "rows": rows})
    return parts


def _baselines_part(run: FinishedRun) -> dict[str, Any] | None:
    """A row for every arm: its rates, what it forgot, and how ours differ from it."""
    if run.baselines is None:
        return None
    table, verdict = run.baselines
    rows = []
    for arm in cast("list[dict[str, Any]]", table.to_dict("records")):
        rates = ("unsafe_refusal_rate", "safe_refusal_rate", "neutral_loss")
        names = [*rates, *(f"ours_minus_{name}" for name in rates)]
        rows.append({"arm": printable(str(arm["arm"])), **{name: _figure_of(arm, name) for name in names}})
    return {"rows": rows, "verdict": _printable_lines(verdict).splitlines()}


def _figure_of(row: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """A figure that a table keeps in columns; None where it was not measured."""
    if name not in row or pd.isna(row[name]):
        return None
    return {"value": row[name], "low": row[f"{name}_low"], "high": row[f"{name}_high"], "n": row.get(f"{name}_n")}


def _experts_part(drawn: dict[str, str], run: FinishedRun, config: ReportConfig) -> dict[str, Any]:
    masks, risk = run.masks, run.risk
    overall = figures.risk_grid(risk, masks)
    limit = max(float(np.nanmax(np.abs(overall))), 1e-3)
    drawn["risk_overall"] = figures.heat_map(
        "risk_overall", "Mean risk difference by layer and expert", overall, masks.union, masks.layers, limit=limit
    )
    shown = _spread(masks.batch_idx, config.batches)
    grids = {batch: figures.risk_grid(risk, masks, batch) for batch in shown}
    own_limit = max([float(np.nanmax(np.abs(grid))) for grid in grids.values()] + [1e-3])
    for batch, grid in grids.items():
        name = f"risk_batch_{batch}"
        text = f"Risk difference of batch {batch}"
        drawn[name] = figures.heat_map(name, text, grid, masks[batch], masks.layers, limit=own_limit, is_small=True)
    batches = [
        {
            "batch_idx": b,
            "category": printable(run.categories[b]),
            "experts": len(masks.selected[b]),
            "figure": f"risk_batch_{b}",
        }
        for b in shown
    ]
    return {
        "top": _top_experts(run),
        "batches": batches[:_BATCHES_IN_SIGHT],
        "more_batches": batches[_BATCHES_IN_SIGHT:],
        "left_out": len(masks.batch_idx) - len(shown),
        "batch_limit": own_limit,
        "overlap": _overlap_part(drawn, run),
        "categories": _categories_part(drawn, run),
        "growth": _growth_part(drawn, run),
    }


def _spread(items: Sequence[int], limit: int) -> list[int]:
    """At most `limit` items, taken evenly over the list."""
    return [items[place * len(items) // limit] for place in range(limit)] if len(items) > limit else list(items)


def _top_experts(run: FinishedRun) -> list[dict[str, Any]]:
    table = aggregate_risk(run.risk).head(_TOP_EXPERTS)
    in_batches = run.masks.masks_BLE.sum(axis=0)
    rows = []
    for row in cast("list[dict[str, Any]]", table.to_dict("records")):
        expert = Expert(int(row["layer"]), int(row["expert"]))
        place = run.masks.layers.index(expert.layer), expert.expert
        rows.append({"name": str(expert), "batches": int(in_batches[place]), **row})
    return rows


def _overlap_part(drawn: dict[str, str], run: FinishedRun) -> dict[str, Any] | None:
    kept = _spread(run.masks.batch_idx, _MOST_BATCHES_COMPARED)
    if len(kept) < 2:
        return None
    table = batch_overlap(run.masks)
    shown = table[table["batch_a"].isin(kept) & table["batch_b"].isin(kept)]
    order = sorted(kept, key=lambda batch: (run.categories[batch], batch))
    drawn["overlap"] = figures.overlap("overlap", "Jaccard index of the batches' unsafe experts", shown, order)
    means = {name: float(table[name].mean()) for name in ("jaccard", "expected", "corrected")}
    return {"pairs": len(table), "left_out": len(run.masks.batch_idx) - len(kept), **means}


def _categories_part(drawn: dict[str, str], run: FinishedRun) -> dict[str, Any] | None:
    by_category = run.by_category
    if by_category["category"].nunique() < 2:
        return None
    drawn["categories"] = figures.experts_by_category("categories", "Unsafe experts by category", by_category)
    shared = shared_experts(by_category)
    return {
        "categories": by_category["category"].nunique(),
        "shared": len(shared),
        "union": len(run.masks.union_experts),
        "rows": [
            {**row, "categories": printable(str(row["categories"]))}
            for row in cast("list[dict[str, Any]]", shared.head(_TOP_EXPERTS).to_dict("records"))
        ],
    }


def _growth_part(drawn: dict[str, str], run: FinishedRun) -> dict[str, Any]:
    selection = run.selection
    largest = float(run.risk["risk_diff"].max())
    thresholds = sorted({*np.linspace(0, max(largest, 1e-3), 12).round(4).tolist(), selection.threshold})
    table = sweep_union(run.risk, thresholds=thresholds, top_ks=sorted({*_TOP_KS, selection.top_k}))
    drawn["union_growth"] = figures.union_growth(
        "union_growth", "Experts in the union over threshold and top_k", table, selection.threshold
    )
    is_plain = selection.rule == "risk_diff" and not selection.alpha and not selection.stability
    return {"is_plain": is_plain, "total": int(run.masks.union.size)}


def _certainty_rows(run: FinishedRun, certainty: pd.DataFrame) -> list[dict[str, Any]]:
    rows = cast("list[dict[str, Any]]", certainty.to_dict("records"))
    return [{**row, "category": printable(run.categories[row["batch_idx"]])} for row in rows]


def _limited(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"rows": rows[:_MOST_ROWS], "left_out": max(0, len(rows) - _MOST_ROWS)}


def _sweep_part(drawn: dict[str, str], run: FinishedRun) -> dict[str, Any] | None:
    """The trials, the best first, and a heat map of those that were finished."""
    manifest = run.manifest("sweep")
    if run.trials is None or manifest is None:
        return None
    notes, trials = manifest["notes"], run.trials
    space = read_space(run.config)
    shown = map_of_trials(trials, space, notes["winner"])
    drawn["sweep"] = figures.trials("sweep", f"{notes['objective']} of the sweep's trials", shown)
    names = ("unsafe_refusal_rate", "safe_refusal_rate", "objective", "forgetting", "union_experts")
    rows = []
    whole = trials.reindex(columns=list(dict.fromkeys([*trials, *names])))
    for trial in cast("list[dict[str, Any]]", whole.to_dict("records")):
        known = {name: None if pd.isna(trial[name]) else trial[name] for name in names}
        within = trial.get("is_within_bound")
        rows.append(
            {
                **known,
                "settings": [printable(str(trial[key])) for key in space.settings],
                "state": trial["state"],
                "over": trial["state"] == "finished" and not within,
            }
        )
    return {
        **notes,
        "settings": space.settings,
        "winner_rate": _winner_rate(run, trials),
        "max_forgetting": run.config.sweep.max_forgetting,
        "has_stars": bool(shown.over.any(axis=None)),
        **_limited(rows),
    }


def _winner_rate(run: FinishedRun, trials: pd.DataFrame) -> dict[str, Any] | None:
    """The winner's refusal rate on unsafe validation prompts, and how many other finished trials lie in its interval."""
    labels = run.validation_labels
    finished = trials[trials["state"] == "finished"]
    if labels is None or finished.empty:
        return None
    n = int((labels == "unsafe").sum())
    won = rate(round(float(finished["unsafe_refusal_rate"].iloc[0]) * n), n)
    others = finished["unsafe_refusal_rate"].iloc[1:]
    return won.as_dict() | {"alike": int(others.between(won.low, won.high).sum()), "others": len(others)}


def _rounds_part(run: FinishedRun) -> dict[str, Any] | None:
    """What each round of fine-tuning did on the validation split."""
    tuned = run.manifest("experts")
    if tuned is None or "rounds" not in tuned["notes"]:
        return None
    notes, settings = tuned["notes"], run.config.rounds
    return {
        "rows": notes["rounds"],
        "kept": notes["kept_round"],
        "stopped_because": printable(notes["stopped_because"]),
        "target": settings.target,
        "action": settings.action,
        "num_batches": len(run.masks.batch_idx),
    }


def _training_part(drawn: dict[str, str], run: FinishedRun) -> dict[str, Any] | None:
    history, tuned = run.history, run.manifest("experts")
    if history is None:
        return None
    drawn["training"] = figures.training_curves("training", "Training loss and gradient norm by step", history)
    ends = [float(history.loc[history["epoch"] == epoch, "loss"].mean()) for epoch in (0, history["epoch"].max())]
    notes = {} if tuned is None else tuned["notes"]
    return {
        "steps": len(history),
        "epochs": int(history["epoch"].max()) + 1,
        "first": ends[0],
        "last": ends[1],
        **notes,
    }


def _examples(run: FinishedRun, limit: int) -> dict[str, Any]:
    """Held-out examples of each label, spread evenly over all, and after the repair those that went wrong."""
    answers = {when: _natural(run.answers(when)) for when in ("before", "after")}
    tables = [table for table in answers.values() if table is not None]
    if not tables or not limit:
        return {}
    groups: dict[str, Any] = {}
    for label in ("unsafe", "safe"):
        ids = tables[-1].loc[tables[-1]["label"] == label, "id"].tolist()
        chosen = [ids[place] for place in _spread(range(len(ids)), limit)]
        groups[f"{label} prompts, spread evenly over {len(ids)}"] = _cards(answers, chosen)
    after = answers["after"]
    if after is not None:
        for label, is_wrong, text in (("unsafe", False, "answered"), ("safe", True, "refused")):
            wrong = after.loc[(after["label"] == label) & (after["refused"] == is_wrong), "id"].tolist()
            if wrong:
                cards = _cards(answers, wrong[:limit])
                groups[f"{label} prompts {text} after the repair: {len(cards)} of {len(wrong)}"] = cards
    return groups


def _natural(answers: pd.DataFrame | None) -> pd.DataFrame | None:
    if answers is None or "routing" not in answers:
        return answers
    return answers[answers["routing"] == "natural"]


def _cards(answers: Mapping[str, pd.DataFrame | None], ids: Sequence[str]) -> list[dict[str, Any]]:
    cards: list[dict[str, Any]] = [{} for _ in ids]
    for when, table in answers.items():
        if table is None:
            continue
        rows = table.drop_duplicates("id").set_index("id")
        for card, row in zip(cards, rows.loc[list(ids)].to_dict("records"), strict=True):
            card |= {"prompt": _text(prompt_text(json.loads(row["messages"]))), "category": printable(row["category"])}
            card[when] = {"answer": _text(row["answer"]), "refused": bool(row["refused"])}
    return cards


_LONGEST_TEXT = 1200


def _text(text: str) -> str:
    """Untrusted text without control characters but line ends, and not too long."""
    clean = _printable_lines(text)
    return clean if len(clean) <= _LONGEST_TEXT else clean[:_LONGEST_TEXT] + " …"


def _printable_lines(text: str) -> str:
    """Untrusted text without control characters but line ends."""
    return "\n".join(printable(line) for line in text.splitlines())


def _stages(run: FinishedRun) -> dict[str, Any]:
    manifests = {name: run.manifest(name) for name in run.stages}
    done = {name: manifest for name, manifest in manifests.items() if manifest is not None}
    latest = list(done.values())[-1]["environment"] if done else {}
    return {
        "seconds": {name: manifest["notes"].get("seconds") for name, manifest in done.items()},
        "commit": latest.get("git_commit"),
        "python": latest.get("python"),
        "versions": latest.get("versions", {}),
    }


def write_report(run: FinishedRun, config: ReportConfig) -> Report:
    """Builds the report and writes it to the run directory."""
    report = build_report(run, config)
    run.folder.write_bytes(REPORT, report.html.encode())
    return report

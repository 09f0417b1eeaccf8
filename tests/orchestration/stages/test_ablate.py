"""The stage: what it makes of a run, when it is done again, and when the full workflow leaves it out."""

from __future__ import annotations

import json
import logging

import causal_model
import pandas as pd
import pytest

from moe_ray.ablation.ablate import ablate_batches
from moe_ray.config.io import load_config
from moe_ray.config.model import ModelConfig
from moe_ray.errors import InputError
from moe_ray.identification.findings import findings_of, joined
from moe_ray.identification.identify import identify as identify_counts
from moe_ray.identification.risk_tables import write_part
from moe_ray.orchestration.run import Run
from moe_ray.orchestration.stages import ablate, capture, identify
from moe_ray.prompts.prompt_set import read_prompts
from moe_ray.prompts.quarantine import QUARANTINE, TRUNCATED, quarantine_frame
from moe_ray.routing.capture_batches import capture_batches
from moe_ray.routing.count_store import read_counts
from moe_ray.routing.count_tables import counts_to_table
from moe_ray.run_directory import (
    ABLATE,
    ABLATION_BATCHES,
    ABLATION_EXPERTS,
    ABLATION_TABLE,
    ANSWERS,
    CAPTURE,
    EFFECTS,
    RISK,
    RunDirectory,
)

pytestmark = pytest.mark.slow

SETTINGS = (
    "prompts.safe_per_batch=6",
    "prompts.unsafe_per_batch=6",
    "prompts.test_fraction=0.3",
    "identify.permutations=0",
    "identify.resamples=0",
    "ablate.relabellings=200",
    "ablate.max_new_tokens=4",
    "evaluate.max_new_tokens=16",
)


@pytest.fixture
def worked(monkeypatch):
    """The work on the cluster, done here; the batches that were measured, each time."""
    model, tokenizer, done = causal_model.build("causal"), causal_model.tokenizer(), []

    def captures(run, config_of_model, config, *, seed, models):
        from moe_ray.prompts.batches import Batch
        from moe_ray.prompts.example_tables import frame_to_examples

        batches = [
            Batch(batch_idx=int(batch), category="", examples=tuple(frame_to_examples(rows)))
            for batch, rows in run.batches.groupby("batch_idx")
        ]
        counts = capture_batches(model, tokenizer, batches, config, seed=seed)
        run.counts_folder.write_table("part-0.parquet", counts_to_table(counts))
        rows = run.batches.iloc[:1].assign(reason="too_long", detail="")
        run.sub(CAPTURE).write_table(QUARANTINE, quarantine_frame(rows))
        run.sub(CAPTURE).write_table(TRUNCATED, quarantine_frame([]))
        return {"tokens": int(counts.num_tokens.sum()), "examples": len(run.batches), "quarantined": 1}

    def identifies(run, folder, config, *, seed):
        counts = read_counts(run.counts_folder)
        risk = identify_counts(counts, config, seed=seed)
        write_part(folder.sub(RISK), risk)
        found = [findings_of(risk, config, seed=seed)]
        return joined(found, config, layers=counts.layers, num_experts=counts.counts_NLE.shape[2])

    def ablates(plans, job, *, seed, models):
        done.append([plan.batch_idx for plan in plans])
        return ablate_batches(model, tokenizer, plans, job.config, seed=seed)

    monkeypatch.setattr(capture.job, "capture", captures)
    monkeypatch.setattr(identify.job, "identify", identifies)
    monkeypatch.setattr(ablate.job, "ablate", ablates)
    return done


@pytest.fixture
def run_of(worked, tmp_path):
    """A function that runs every stage up to masks; returns the run."""
    rows = [
        {"id": e.id, "prompt": e.messages[0]["content"], "label": e.label, "category": e.category, "target": "No."}
        for name in causal_model.CATEGORIES
        for e in causal_model.examples(name, 30)
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    causal_model.build("causal").save_pretrained(tmp_path / "model")
    causal_model.tokenizer().save_pretrained(tmp_path / "model")

    def runs(*settings):
        paths = (f"run_dir={tmp_path}/run", f"prompts.files={tmp_path}/prompts.jsonl")
        config = load_config(None, [*paths, *SETTINGS, *settings])
        model = ModelConfig(path=str(tmp_path / "model"))
        run = Run(config, model, read_prompts(config), RunDirectory.open(config.run_dir))
        for stage in ("prepare", "capture", "identify"):
            getattr(run, stage)()
        return run

    return runs


def test_the_stage_leaves_effects_tables_and_a_verdict(run_of):
    run = run_of()
    notes = run.ablate().notes
    assert notes["verdict"] == "causal"
    assert set(notes["sources"].values()) == {"held_out"}
    assert notes["forwards"] > 0
    folder = run.directory.sub(ABLATE)
    effects = folder.read_frame(EFFECTS)
    assert {"batch_idx", "category", "set", "draw", "id", "label", "effect", "experts", "share"} <= set(effects)
    assert set(effects["id"]) <= set(run.directory.test["id"])
    assert len(folder.read_frame(ANSWERS)) == effects.loc[effects["set"] == "selected"].shape[0]
    for name in (ABLATION_TABLE, ABLATION_BATCHES, ABLATION_EXPERTS):
        assert len(pd.read_csv(folder.file(name)))
    directory = RunDirectory.open(run.directory.folder.path)
    assert directory.ablation["in_words"] == notes["in_words"]
    assert "ablate" in directory.stages
    assert len(directory.ablated_experts)


def test_it_is_reused_until_something_that_it_depends_on_changes(run_of, worked):
    run_of().ablate()
    for unchanged in (
        ("ablate.run=true",), ("ablate.num_actors=2",), ("prompts.refusal=Never.",), ("ablate.tokens_per_forward=99",),
    ):  # fmt: skip
        run_of(*unchanged).ablate()
    assert len(worked) == 1
    for number, changed in enumerate(
        ("ablate.draws=2", "ablate.min_effect=0.2", "identify.top_k=1", "ablate.max_batches=2"), start=2
    ):
        run_of(changed).ablate()
        assert len(worked) == number, changed
    assert len(worked[-1]) == 2


def test_prompts_in_quarantine_are_not_asked(run_of):
    run = run_of("ablate.source=batch", "ablate.max_batches=0")
    run.ablate()
    answers = run.directory.sub(ABLATE).read_frame(ANSWERS)
    quarantined = run.directory.sub(CAPTURE).read_frame(QUARANTINE)["id"]
    assert len(quarantined) == 1
    assert not set(quarantined) & set(answers["id"])
    assert set(answers["id"]) | set(quarantined) == set(run.directory.batches["id"])


def test_too_few_held_out_prompts_are_said_to_be_too_few(run_of, caplog):
    run_of("ablate.prompts=8", "prompts.max_test_examples=2").ablate()
    assert "are asked their own prompts, which chose the experts" in caplog.text


@pytest.mark.parametrize(
    ("settings", "details"),
    [
        (("ablate.run=true",), (8, 5)),
        (("ablate.run=false",), None),
        ((), None),
        (("ablate.prompts=1", "ablate.max_batches=1", "finetune.epochs=50", "ablate.draws=1"), (8, 5)),
    ],
)
def test_the_full_workflow_does_what_is_asked_or_cheap(run_of, settings, details, caplog):
    with caplog.at_level(logging.INFO):
        config = run_of(*settings).affordable_check()
    assert (None if config is None else (config.leave_one_out, config.curve)) == details
    assert ("tokens in forward passes" in caplog.text) == (not any("ablate.run" in setting for setting in settings))


def test_where_nobody_asked_for_it_a_model_that_cannot_be_masked_goes_without(run_of, monkeypatch, caplog):
    def refused(model):
        raise InputError("its routers cannot be masked")

    monkeypatch.setattr(ablate, "check_maskable", refused)
    cheap = ("ablate.prompts=1", "ablate.max_batches=1", "finetune.epochs=50", "ablate.draws=1")
    assert run_of(*cheap).affordable_check() is None
    assert "ablate: left out; its routers cannot be masked" in caplog.text
    assert run_of(*cheap, "ablate.run=true").affordable_check() is not None

"""What makes a stage run again: settings that change its output, and what earlier stages made; nothing else does."""

from __future__ import annotations

import json
import logging
import uuid
from dataclasses import replace

import pandas as pd
import pytest

from moe_ray.config.io import load_config
from moe_ray.experts import Expert
from moe_ray.finetuning.adapter_files import HEADER, TENSORS
from moe_ray.identification.findings import findings_of, joined
from moe_ray.identification.identify import identify as identify_counts
from moe_ray.identification.risk_tables import write_part
from moe_ray.orchestration.jobs.answer import Answers
from moe_ray.orchestration.run import Run
from moe_ray.orchestration.stages import capture, evaluate, finetune, identify
from moe_ray.prompts.neutral_texts import neutral_texts
from moe_ray.prompts.prompt_set import read_prompts
from moe_ray.prompts.quarantine import QUARANTINE, TRUNCATED, quarantine_frame
from moe_ray.routing.count_store import read_counts
from moe_ray.routing.count_tables import counts_to_table
from moe_ray.run_directory import CAPTURE, RISK, RunDirectory
from moe_ray.testing.simulated_counts import Population, simulate

ABOUT_ADAPTER = {
    **{"format": 1, "base": "", "base_hash": "", "mask_hash": "", "model_type": ""},
    **{"layers": [], "num_experts": 0, "experts": []},
}
STAGES = ("prepare", "capture", "identify", "finetune")


@pytest.fixture
def jobs(monkeypatch):
    """The work on the cluster, done here on simulated counts; a list of what was worked on."""
    done = []

    def captures(run, model, config, *, seed, models):
        done.append("capture")
        counts = simulate(Population(num_layers=3), num_batches=3, planted=(Expert(1, 3),), shift=0.7)
        run.counts_folder.write_table("part-0.parquet", counts_to_table(counts))
        for name in (QUARANTINE, TRUNCATED):
            run.sub(CAPTURE).write_table(name, quarantine_frame([]))
        return {"tokens": int(counts.num_tokens.sum()), "quarantined": 0}

    def identifies(run, folder, config, *, seed):
        done.append("identify")
        counts = read_counts(run.counts_folder)
        risk = identify_counts(counts, config, seed=seed)
        write_part(folder.sub(RISK), risk)
        found = [findings_of(risk, config, seed=seed)]
        return joined(found, config, layers=counts.layers, num_experts=counts.counts_NLE.shape[2])

    def trains(run, job, inputs):
        done.append("finetune")
        job.folder().write_bytes(TENSORS, uuid.uuid4().bytes)
        job.folder().write_json(HEADER, ABOUT_ADAPTER)
        return {"trainable_parameters": 1, "total_parameters": 2, "frozen_parameters_changed": 0}

    def answers(frame, job, *, what, routing, neutral, models):
        done.append("answers")
        return Answers(answers=pd.DataFrame({"answer": ["Yes."]}), neutral=None, routing=None)

    monkeypatch.setattr(evaluate, "answer", answers)
    monkeypatch.setattr(capture.job, "capture", captures)
    monkeypatch.setattr(identify.job, "identify", identifies)
    monkeypatch.setattr(finetune, "train", trains)
    return done


@pytest.fixture
def run_to_experts(jobs, untrained_model_path, tmp_path):
    """A function that runs every stage up to the learned experts; returns what was worked on."""
    labels = ("safe", "unsafe")
    rows = [
        {"prompt": f"prompt {n}", "label": labels[n % 2]} | ({"target": "Yes."} if n % 2 == 0 else {})
        for n in range(96)
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def runs(*settings):
        jobs.clear()
        config = load_config(
            None,
            [
                f"run_dir={tmp_path}/run",
                f"prompts.files={tmp_path}/prompts.jsonl",
                "prompts.max_batches=3",
                # The simulated counts are of prompts.
                "identify.roles=[prompt]",
                "identify.weighting=tokens",
                "capture.generate=false",
                "identify.permutations=50",
                "identify.resamples=5",
                *settings,
            ],
        )
        model = replace(config.model, path=str(untrained_model_path))
        run = Run(config, model, read_prompts(config), RunDirectory.open(config.run_dir))
        for stage in STAGES:
            getattr(run, stage)()
        evaluate.answer_held_out(run, "before")
        evaluate.answer_held_out(run, "after")
        return list(jobs)

    assert runs() == ["capture", "identify", "finetune", "answers", "answers"]
    return runs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "worked_on"),
    [
        # Held-out prompts and targets are none of the capture's business.
        ("prompts.max_test_examples=4", ["answers", "answers"]),
        ("prompts.refusal=No, I will not.", ["identify", "finetune", "answers", "answers"]),
        # More relabellings say more of the same experts, which are trained already.
        ("identify.permutations=60", ["identify"]),
        ("identify.resamples=6", ["identify"]),
        ("identify.top_k=2", ["identify", "finetune", "answers"]),
        ("capture.too_long=truncate", ["capture"]),
        ("finetune.learning_rate=1e-4", ["finetune", "answers"]),
        ("finetune.epochs=2", ["finetune", "answers"]),
        ("finetune.short_layers=natural", ["finetune", "answers"]),
        ("evaluate.max_new_tokens=7", ["answers", "answers"]),
        ("model.dtype=bfloat16", ["capture", "finetune", "answers", "answers"]),
        ("model.experts_implementation=grouped_mm", ["capture", "finetune", "answers", "answers"]),
        ("capture.template_tokens=false", ["capture"]),
    ],
)
def test_a_setting_works_anew_on_the_stages_that_it_affects_and_no_other(run_to_experts, setting, worked_on):
    assert run_to_experts(setting) == worked_on
    assert run_to_experts(setting) == []


@pytest.mark.slow
def test_settings_that_change_nothing_that_comes_out_work_nothing_anew(run_to_experts):
    changed = (
        "finetune.rows_per_forward=3",
        "finetune.tokens_per_forward=512",
        "finetune.monitor=false",
        "finetune.gpus_per_worker=1",
        "finetune.activation_checkpointing=true",
        "finetune.checkpoint_every=7",
        "capture.tokens_per_forward=77",
        "capture.num_actors=3",
        "capture.max_bad_share=0.5",
        "evaluate.tokens_per_forward=77",
        "cluster.num_cpus=7",
        "tracking.experiment=other",
        "evaluate.judge_retries=7",
        # On CPU `auto` is float32 and eager, so saying so changes nothing; another type changes all numbers.
        "model.dtype=float32",
    )
    assert run_to_experts(*changed) == []


@pytest.mark.slow
def test_what_a_file_says_matters_and_not_where_it_is(run_to_experts, tmp_path):
    (tmp_path / "moved").mkdir()
    (tmp_path / "prompts.jsonl").rename(tmp_path / "moved" / "prompts.jsonl")
    (tmp_path / "neutral.txt").write_text("\n\n".join(neutral_texts()))
    moved = (f"prompts.files={tmp_path}/moved/prompts.jsonl", f"evaluate.neutral_file={tmp_path}/neutral.txt")
    assert run_to_experts(*moved) == []
    (tmp_path / "neutral.txt").write_text("Another text.")
    assert run_to_experts(*moved) == ["answers", "answers"]


@pytest.mark.slow
def test_workers_matter_only_where_they_say_how_many_batches_a_step_takes(run_to_experts):
    assert run_to_experts("finetune.batches_per_step=2", "finetune.num_workers=1") == ["finetune", "answers"]
    assert run_to_experts("finetune.batches_per_step=2", "finetune.num_workers=2") == []
    assert run_to_experts("finetune.num_workers=2") == []
    assert run_to_experts("finetune.num_workers=1") == ["finetune", "answers"]


@pytest.mark.slow
def test_what_a_stage_made_decides_about_the_next_one_not_what_it_was_asked(run_to_experts, caplog):
    """Captured anew with the same outcome, nothing after the capture is done again."""
    with caplog.at_level(logging.INFO):
        assert run_to_experts("capture.template_tokens=false") == ["capture"]
    assert "capture: run again, because these inputs changed: capture.template_tokens" in caplog.messages
    assert "identify: reused from an earlier run" in caplog.messages


@pytest.mark.slow
def test_settings_of_rounds_matter_only_where_there_are_rounds(run_to_experts):
    assert run_to_experts("rounds.target=0.5") == []

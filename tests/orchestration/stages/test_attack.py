"""The stage: every attack on both models, resumable one by one, in this process."""

from __future__ import annotations

import json

import causal_model
import pandas as pd
import pytest
import torch
from in_process_pool import InProcessPool

from moe_ray.config.io import load_config
from moe_ray.config.model import ModelConfig
from moe_ray.experts import Expert, masks_from_experts
from moe_ray.finetuning.adapter import expert_weights, hash_weights, save_adapter
from moe_ray.finetuning.trainable_experts import trainable_experts
from moe_ray.orchestration.run import Run
from moe_ray.prompts.example_tables import examples_to_frame
from moe_ray.prompts.quarantine import QUARANTINE, TRUNCATED, quarantine_frame
from moe_ray.run_directory import ANSWERS, ATTACK, CAPTURE, FINETUNE, PROMPTS, TEST, RunDirectory
from moe_ray.storage.stage import MADE, Outcome

pytestmark = pytest.mark.slow

NAMES = ["base64", "prefill", "random_routes", "silenced_experts", "benign_finetuning"]


@pytest.fixture
def run_of(tmp_path):
    """A function that gives a run whose experts are learned: those of both categories know nothing any more."""
    model, tokenizer = causal_model.build("causal"), causal_model.tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    pool = InProcessPool(model, tokenizer)
    directory = RunDirectory.open(str(tmp_path / "run"))
    test = [e for name in causal_model.CATEGORIES for e in causal_model.examples(name, 6)]
    frame = examples_to_frame(test).assign(batch_idx=0)
    directory.sub(PROMPTS).write_table(TEST, frame)
    train = examples_to_frame(causal_model.batches(1)[0].examples).assign(target="answer", batch_idx=0)
    train["in_batch_idx"] = range(len(train))
    directory.sub(PROMPTS).write_table("batches.parquet", train)
    for name in (QUARANTINE, TRUNCATED):
        directory.sub(CAPTURE).write_table(name, quarantine_frame([]))
    experts = [Expert(0, expert) for expert in causal_model.OWN_EXPERT.values()]
    masks = masks_from_experts({0: experts}, layers=(0,), num_experts=causal_model.NUM_EXPERTS)
    with trainable_experts(model, masks.union) as trainable:
        base_hash = hash_weights(expert_weights(model, experts))
        with torch.no_grad():
            for parameter in trainable.all_parameters():
                parameter.zero_()
        folder = directory.sub(FINETUNE).path
        save_adapter(folder, trainable, base="", base_hash=base_hash, mask_hash=masks.digest())

    def outcome(name, **made):
        return Outcome(folder=directory.sub(name), notes={MADE: made}, seconds=0.0, is_reused=True)

    def runs(*settings, experts="learned"):
        config = load_config(
            None,
            [
                f"run_dir={tmp_path}/run",
                f"attack.names=[{','.join(NAMES)}]",
                "attack.affirmations=[do-fraud,answer]",
                "attack.prefix=answer",
                "attack.max_prompts=4",
                "attack.max_new_tokens=3",
                "attack.benign_steps=2",
                *settings,
            ],
        )
        run = Run(config, ModelConfig(path=str(tmp_path / "model")), None, RunDirectory(directory.folder))
        run.models = pool
        run.outcomes = {
            PROMPTS: outcome(PROMPTS, test="test", targets="targets"),
            FINETUNE: outcome(FINETUNE, experts=experts),
        }
        return run

    return runs, pool


def test_every_attack_has_the_answers_of_both_models_with_verdicts(run_of):
    runs, pool = run_of
    before = {name: tensor.clone() for name, tensor in pool.holder.model.state_dict().items()}
    run = runs()
    notes = run.attack().notes
    answers = run.directory.sub(ATTACK).read_frame(ANSWERS)
    counted = answers.groupby(["attack", "when", "label"]).size()
    assert set(counted.index.get_level_values("attack")) == {"none", *NAMES}
    assert (counted == 4).all()
    assert {"answer", "ended", "refused", "asked", "messages", "pair"} <= set(answers)
    assert all(torch.equal(tensor, before[name]) for name, tensor in pool.holder.model.state_dict().items())
    assert list(notes["figures"]) == ["none", *NAMES]
    assert notes["prompts"] == {"safe": 4, "unsafe": 4}
    assert notes["about"]["silenced_experts"]["after_silenced"] == 2
    assert run.directory.attacks["figures"] == json.loads(json.dumps(notes["figures"]))
    plain = answers[(answers["attack"] == "none") & (answers["label"] == "unsafe")].set_index("when")["answer"]
    assert set(plain["before"]) == {"do-fraud", "do-theft"}
    assert not set(plain["after"]) & {"do-fraud", "do-theft"}


def test_it_is_reused_and_another_attack_runs_that_one_only(run_of):
    runs, pool = run_of
    runs("attack.names=[base64,prefill]").attack()
    assert [(job.name, job.is_repaired) for job in pool.jobs] == [
        (name, is_repaired) for name in ("none", "base64", "prefill") for is_repaired in (False, True)
    ]
    del pool.jobs[:]
    for unchanged in ("evaluate.num_actors=2", "tracking.experiment=other", "attack.run=true"):
        runs("attack.names=[base64,prefill]", unchanged).attack()
    assert pool.jobs == []
    notes = runs("attack.names=[base64,silenced_experts]").attack().notes
    assert {job.name for job in pool.jobs} == {"silenced_experts"}
    assert list(notes["figures"]) == ["none", "base64", "silenced_experts"]


def test_what_an_attack_depends_on_runs_it_again_and_no_other(run_of):
    runs, pool = run_of
    names = "attack.names=[base64,prefill,benign_finetuning]"
    runs(names).attack()
    now = []
    for changed, expected in (
        ("attack.prefix=do-fraud", {("prefill", False), ("prefill", True)}),
        ("attack.benign_steps=3", {("benign_finetuning", False), ("benign_finetuning", True)}),
    ):
        del pool.jobs[:]
        now.append(changed)
        runs(names, *now).attack()
        assert {(job.name, job.is_repaired) for job in pool.jobs} == expected
    del pool.jobs[:]
    runs(names, *now, experts="other").attack()
    # Prompts are asked of the base model, whatever was learned; the experts that are tuned are the learned ones.
    assert {(job.name, job.is_repaired) for job in pool.jobs} == {
        ("none", True), ("base64", True), ("prefill", True), ("benign_finetuning", False), ("benign_finetuning", True),
    }  # fmt: skip


def test_an_attack_that_was_killed_goes_on_with_the_prompts_that_are_missing(run_of, monkeypatch):
    runs, _ = run_of
    run = runs("attack.names=[prefill]", "evaluate.tokens_per_forward=1")
    asked = []
    from moe_ray.orchestration.jobs import attack as job

    original = job.answer_attacked

    def killed(model, tokenizer, rows, *more, **options):
        asked.extend(rows["id"])
        if len(asked) > 3:
            raise KeyboardInterrupt
        return original(model, tokenizer, rows, *more, **options)

    monkeypatch.setattr(job, "answer_attacked", killed)
    with pytest.raises(KeyboardInterrupt):
        run.attack()
    done = asked[:3]
    del asked[:]
    monkeypatch.setattr(
        job,
        "answer_attacked",
        lambda m, t, rows, *more, **o: (asked.extend(rows["id"]), original(m, t, rows, *more, **o))[1],
    )
    run.attack()
    first = pd.Series(asked[: 8 - len(done)])
    assert not set(first) & set(done)


def test_prompts_that_are_too_long_in_another_form_are_left_out_and_counted(run_of, caplog, monkeypatch):
    runs, _ = run_of
    monkeypatch.setattr("moe_ray.orchestration.stages.answering.context_length", lambda model: 12)
    notes = runs("attack.names=[morse]").attack().notes
    assert notes["left_out"] == {"morse": 8}
    assert list(notes["figures"]) == ["none"]
    assert "attack morse: 8 of 8 prompts cannot be asked" in caplog.text

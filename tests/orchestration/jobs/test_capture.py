"""Capture on Ray: the core's counts whatever dies, little padding, bad examples set aside, actors gone afterwards."""

import json
import os
import signal
import subprocess
import sys
import time

import capture_helpers
import numpy as np
import pandas as pd
import pytest
import ray
from capture_helpers import (
    DEADLY,
    ActorThatDiesOnce,
    ActorWithLittleMemory,
    counts_of_core,
    message,
    write_batches,
)
from paths import ROOT, TESTS
from prompt_tokens import by_prompt_tokens

from moe_ray import pipeline
from moe_ray.config.capture import CaptureConfig
from moe_ray.config.finetune import FinetuneConfig
from moe_ray.config.model import ModelConfig
from moe_ray.errors import InputError
from moe_ray.experts import Expert, masks_from_experts
from moe_ray.finetuning.history import read_history
from moe_ray.identification.mask_files import write_masks
from moe_ray.identification.risk_tables import RiskParts
from moe_ray.models.generation import example_seed, generate_responses
from moe_ray.models.loading import load_model, load_tokenizer
from moe_ray.models.tokenization import TokenizedRow, encode_row
from moe_ray.orchestration.cluster import ray_session as cluster
from moe_ray.orchestration.jobs.capture import capture
from moe_ray.orchestration.jobs.finetune import FinetuneJob, finetune
from moe_ray.orchestration.jobs.identify import identify
from moe_ray.prompts.quarantine import (
    EMPTY,
    NOT_ENCODED,
    PROCESS_DIED,
    QUARANTINE,
    TOO_LONG,
    TRUNCATED,
    Rejected,
    quarantine_frame,
    rejected_row,
    without_quarantined,
)
from moe_ray.routing.capture import count_rows
from moe_ray.routing.count_keys import keys_of
from moe_ray.routing.count_store import read_counts
from moe_ray.routing.count_tables import counts_to_table, table_to_counts
from moe_ray.routing.counter import counting
from moe_ray.run_directory import CAPTURE, IDENTIFY, RISK, RunDirectory
from moe_ray.storage.folder import Folder

# Ray's workers cannot import test modules.
ray.cloudpickle.register_pickle_by_value(capture_helpers)

pytestmark = [pytest.mark.needs_ray, pytest.mark.slow, pytest.mark.filterwarnings("default")]


@pytest.fixture
def model(tiny_model_path):
    return ModelConfig(path=str(tiny_model_path))


def opened(tmp_path):
    run = RunDirectory.open(str(tmp_path))
    return run, run.sub(CAPTURE)


def assert_same_counts(got, expected):
    for name in ("batch_idx", "in_batch_idx", "role", "num_tokens", "counts_NLE"):
        assert np.array_equal(getattr(got, name), getattr(expected, name)), name


def free_cpus():
    return ray.available_resources()["CPU"]


@pytest.mark.exhaustive
def test_bad_examples_are_quarantined_with_their_reasons_and_the_rest_is_counted(ray_cluster, model, tmp_path):
    changes = [(5, message(" ")), (18, message("very " * 3000)), (33, message(DEADLY))]
    frame = write_batches(tmp_path / "prompts", 16, changes=changes)
    run, out = opened(tmp_path)
    before = free_cpus()
    config = CaptureConfig(generate=False, tokens_per_forward=1024, weights=True, ids=True)
    notes = capture(run, model, config, actor=ActorWithLittleMemory)
    assert free_cpus() == before
    quarantined = out.read_frame(QUARANTINE)
    assert dict(zip(quarantined["id"], quarantined["reason"], strict=True)) == {
        "row5": EMPTY,
        "row18": TOO_LONG,
        "row33": PROCESS_DIED,
    }
    assert (notes["examples"], notes["quarantined"]) == (64, 3)
    assert notes["halvings"] > 0
    assert notes["padding_share"] < 0.1
    assert notes["experts_are_copies"] is False
    expected = counts_of_core(frame, model, weights=True)
    bad = keys_of(quarantined["batch_idx"], quarantined["in_batch_idx"])
    expected = expected.take(~np.isin(keys_of(expected.batch_idx, expected.in_batch_idx), bad))
    got = read_counts(out.sub("counts"))
    assert_same_counts(got, expected)
    np.testing.assert_allclose(got.weights_NLE, expected.weights_NLE, atol=1e-3)
    assert notes["tokens"] == expected.num_tokens.sum()
    part = table_to_counts(out.sub("counts").read_table(out.sub("counts").parquet_names()[0]))
    for ids_TLK, counts_LE in zip(part.ids, part.counts_NLE, strict=True):
        assert np.array_equal(np.bincount(ids_TLK[:, 1].ravel(), minlength=24), counts_LE[1])
    assert not any(out.exists(name) for name in ("rejected", "attempts", "shortened"))


def test_identification_leaves_out_a_batch_that_lost_a_label(ray_cluster, model, tmp_path):
    frame = write_batches(tmp_path / "prompts", 12, changes=[(4, message(" ")), (5, message(" ")), (8, message(" "))])
    run, out = opened(tmp_path)
    capture(run, model, CaptureConfig(generate=False, max_bad_share=0.1))
    identify(run, run.sub(IDENTIFY), by_prompt_tokens(resamples=0), seed=0)
    risk = RiskParts(run.sub(f"{IDENTIFY}/{RISK}")).frame()
    assert sorted(set(risk["batch_idx"])) == [0, *range(2, 12)]
    kept = without_quarantined(frame, out.read_frame(QUARANTINE))
    config = by_prompt_tokens(permutations=0, resamples=0)
    expected = pipeline.identify(counts_of_core(kept[kept["batch_idx"] != 1], model), config=config).risk
    assert np.array_equal(risk["risk_diff"], expected["risk_diff"])


def test_training_leaves_out_quarantined_examples_and_batches_without_a_mask(model, tmp_path):
    broken = message("hello", role="robot")
    frame = write_batches(tmp_path / "prompts", 3, changes=[(5, broken), (8, broken)])
    run, out = opened(tmp_path)
    reason = Rejected(NOT_ENCODED, "unknown role")
    out.write_table(QUARANTINE, quarantine_frame([rejected_row(frame.loc[row], reason) for row in (5, 8)]))
    out.write_table(TRUNCATED, quarantine_frame([]))
    write_masks(
        run.sub(IDENTIFY),
        masks_from_experts({0: (Expert(0, 1),), 1: (Expert(1, 2),)}, layers=(0, 1, 2), num_experts=24),
    )
    job = FinetuneJob(model=model, config=FinetuneConfig(num_workers=0, epochs=1), seed=0, run_url=run.folder.url)
    assert finetune(job)["frozen_parameters_changed"] == 0
    steps = read_history(job.folder())
    assert sorted(step["batch_idx"] for step in steps) == [0, 1]
    out.write_table(QUARANTINE, quarantine_frame([]))
    with pytest.raises(InputError, match="unknown role"):
        finetune(job)


def test_a_capture_killed_before_its_manifest_forgets_no_shortened_example(tmp_path, model):
    frame = write_batches(tmp_path / "prompts", 3)
    run, out = opened(tmp_path)
    out.sub("counts").write_table("part-0.parquet", counts_to_table(counts_of_core(frame, model)))
    why = Rejected("truncated", "99 tokens, cut to 64")
    out.sub("shortened").write_table("part-0.parquet", quarantine_frame([rejected_row(frame.loc[3], why)]))
    # Everything is counted, so nothing is done but the end of the work, twice.
    notes = [capture(run, model, CaptureConfig(generate=False)) for _ in range(2)]
    assert [note["truncated"] for note in notes] == [1, 1]
    assert out.read_frame(TRUNCATED)["id"].tolist() == ["row3"]


def test_a_capture_killed_before_its_manifest_still_knows_whether_experts_are_copies(ray_cluster, model, tmp_path):
    write_batches(tmp_path / "prompts", 2)
    run, _ = opened(tmp_path)
    # The second counts nothing, as one that goes on after the last count.
    notes = [capture(run, model, CaptureConfig(generate=False)) for _ in range(2)]
    assert [(note["forwards"] > 0, note["experts_are_copies"]) for note in notes] == [(True, False), (False, False)]


def test_too_many_bad_examples_stop_the_capture_and_its_actors_are_gone(ray_cluster, model, tmp_path):
    write_batches(tmp_path / "prompts", 5, changes=[(row, message("")) for row in range(3)])
    run, _ = opened(tmp_path)
    before = free_cpus()
    with pytest.raises(InputError, match=r"3 of 20 examples cannot be captured.*3 empty.*'row0'") as caught:
        capture(run, model, CaptureConfig(generate=False))
    assert free_cpus() == before
    assert "\n" not in str(caught.value)


def test_an_example_that_is_too_long_stops_the_capture_where_that_is_the_policy(ray_cluster, model, tmp_path):
    write_batches(tmp_path / "prompts", 12, changes=[(18, message("bread " * 600))])
    run, _ = opened(tmp_path)
    before = free_cpus()
    with pytest.raises(InputError, match=r"row18: an example is too long: \d+ tokens, expected at most \d+") as caught:
        capture(run, model, CaptureConfig(generate=False, too_long="error"))
    assert "\n" not in str(caught.value)
    assert free_cpus() == before


def test_an_actor_that_dies_in_mid_run_loses_and_doubles_nothing(ray_cluster, model, tmp_path):
    frame = write_batches(tmp_path / "prompts", 32)
    run, out = opened(tmp_path)
    config = CaptureConfig(generate=False, tokens_per_forward=256, max_actors=2)
    notes = capture(run, model, config, actor=ActorThatDiesOnce, seconds_per_part=0.0)
    assert out.exists("died")
    assert notes["quarantined"] == 0
    assert_same_counts(read_counts(out.sub("counts")), counts_of_core(frame, model))


@pytest.mark.exhaustive
def test_a_killed_driver_goes_on_where_it_was(ray_cluster, model, tmp_path):
    frame = write_batches(tmp_path / "prompts", 32)
    run, out = opened(tmp_path)
    driver = subprocess.Popen(
        [
            sys.executable,
            str(TESTS / "capture_helpers.py"),
            ray.get_runtime_context().gcs_address,
            model.path,
            str(tmp_path),
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        stderr=subprocess.PIPE,
        text=True,
    )
    parts = out.sub("counts")
    try:
        deadline = time.monotonic() + 120
        while len(parts.parquet_names()) < 3:
            assert driver.poll() is None, driver.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
    written = {name: (tmp_path / "capture" / "counts" / name).stat().st_mtime_ns for name in parts.parquet_names()}
    notes = capture(run, model, CaptureConfig(generate=False))
    assert notes["forwards"] > 0
    assert_same_counts(read_counts(parts), counts_of_core(frame, model))
    assert {name: (tmp_path / "capture" / "counts" / name).stat().st_mtime_ns for name in written} == written
    again = capture(run, model, CaptureConfig(generate=False))
    assert (again["forwards"], again["tokens"]) == (0, notes["tokens"])


def test_generated_responses_are_kept_and_counted_as_they_were_generated(ray_cluster, model, tmp_path):
    frame = write_batches(tmp_path / "prompts", 8)
    run, out = opened(tmp_path)
    config = CaptureConfig(generate=True, max_new_tokens=6, temperature=1.0, template_tokens=False)
    notes = capture(run, model, config, seed=3)
    parts = out.sub("responses")
    responses = pd.concat([parts.read_frame(name) for name in parts.parquet_names()]).set_index("id")
    assert set(responses.index) == set(frame.loc[frame["response"].isna(), "id"])
    assert notes["own_answers"]["examples"] == len(responses)
    assert notes["own_answers"]["tokens"] == responses["ids"].map(len).sum()
    assert notes["own_answers"]["unsafe"] == (responses["label"] == "unsafe").sum()
    counts = read_counts(out.sub("counts"))
    loaded, tokenizer = load_model(model, device="cpu"), load_tokenizer(model)
    with counting(loaded) as counter:
        for row in (1, 2, 13):
            prompt = encode_row(tokenizer, json.loads(frame.loc[row, "messages"]), template_tokens=False)
            (expected,) = generate_responses(
                loaded,
                tokenizer,
                [prompt.prompt_ids],
                max_new_tokens=6,
                temperature=1.0,
                seeds=[example_seed(3, row // 4, row % 4)],
            )
            assert tuple(responses.loc[f"row{row}", ["response", "ended"]]) == (expected.text, expected.ended)
            counted = [*prompt.counted, *(token != tokenizer.eos_token_id for token in expected.ids)]
            forced, num_tokens = count_rows(
                loaded, counter, [TokenizedRow(prompt.prompt_ids, expected.ids, counted)], pad_id=0
            )
            chosen = (counts.batch_idx == row // 4) & (counts.in_batch_idx == row % 4)
            assert np.array_equal(counts.counts_NLE[chosen], forced[0][num_tokens[0] > 0])


def test_a_run_directory_that_workers_cannot_reach_is_refused(ray_cluster):
    with pytest.raises(InputError, match="shared file system") as caught:
        cluster.check_reachable(Folder.open("memory://run"))
    assert "1 of 1 nodes" in str(caught.value)
    assert Folder.open("memory://run").names() == []


def test_a_run_directory_that_workers_share_is_accepted(ray_cluster, tmp_path, monkeypatch):
    node = next(node for node in ray.nodes() if node["Alive"])
    monkeypatch.setattr(ray, "nodes", lambda: [node, node])
    cluster.check_reachable(Folder.open(str(tmp_path)))
    assert list(tmp_path.iterdir()) == []

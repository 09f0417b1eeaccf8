"""A copy of the model that two processes hold together does what one process does, and dies and comes back as one."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import ray
import torch
from prompt_tokens import by_prompt_tokens
from study_runs import must_not_be_called
from study_runs import settings as settings_of_run
from workflow import run_workflow

from moe_ray import pipeline
from moe_ray.config.capture import CaptureConfig
from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.config.finetune import FinetuneConfig
from moe_ray.config.model import ModelConfig
from moe_ray.demo.examples import embedded_records
from moe_ray.errors import InputError
from moe_ray.identification.mask_files import write_masks
from moe_ray.models.expert_storage import local_part
from moe_ray.models.joint_passes import PassBroken
from moe_ray.orchestration.cluster.model_actor import ModelWork
from moe_ray.orchestration.cluster.model_pool import ModelPool
from moe_ray.orchestration.cluster.model_process import ModelHolder
from moe_ray.orchestration.jobs.answer import AnswerActor, answer, read_answers
from moe_ray.orchestration.jobs.answer_job import AnswerJob, as_table, blocks_of
from moe_ray.orchestration.jobs.capture import capture
from moe_ray.orchestration.jobs.capture_actor import CaptureActor, CaptureJob
from moe_ray.orchestration.jobs.finetune import FinetuneJob, finetune
from moe_ray.prompts.batches import assemble_batches
from moe_ray.prompts.example_tables import BATCHES, batches_to_frame, examples_to_frame
from moe_ray.prompts.examples import records_to_examples
from moe_ray.prompts.quarantine import QUARANTINE, TRUNCATED, quarantine_frame
from moe_ray.routing.count_store import read_counts
from moe_ray.run_directory import ATTEMPTS, CAPTURE, FINETUNE, IDENTIFY, PROMPTS, RESPONSES, RunDirectory

pytestmark = [pytest.mark.needs_ray, pytest.mark.slow, pytest.mark.filterwarnings("default")]

GENERATED = CaptureConfig(generate=True, max_new_tokens=6, weights=True)


class Look(ModelWork):
    """Which process this is, those of its group, and which share of the model's numbers it holds."""

    def __call__(self, block):
        parameters = list(self.holder.model.parameters())
        held = sum(local_part(tensor).numel() for tensor in parameters)
        return os.getpid(), followers(), held / sum(tensor.numel() for tensor in parameters)


class Kills(ModelWork):
    """The first call that finds no marker ends a process of the group the hard way, and goes on with a pass."""

    def __call__(self, block):
        marker, whom = self.job
        if not Path(marker).exists():
            Path(marker).touch()
            os.kill(os.getpid() if whom == "leader" else followers()[0], signal.SIGKILL)
        with torch.inference_mode():
            self.holder.model(input_ids=torch.ones(1, 3, dtype=torch.int64))
        return block


class Fails(ModelWork):
    def __call__(self, block):
        raise InputError(f"block {block} is wrong")


class Breaks(ModelWork):
    """A pass that ends in the middle."""

    def __call__(self, block):
        self.holder.model.get_output_embeddings().register_forward_pre_hook(self.end)
        with torch.inference_mode():
            self.holder.model(input_ids=torch.ones(1, 3, dtype=torch.int64))

    def end(self, *_):
        raise torch.OutOfMemoryError("no room")


def processes(title):
    """Ids of processes with a title that this program's Ray started."""
    raylet = psutil.Process(psutil.Process().ppid() if "ray::" in " ".join(psutil.Process().cmdline()) else os.getpid())
    found = []
    for process in raylet.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith(title):
                found.append(process.pid)
    return found


def followers():
    """Ids of processes that serve in a group."""
    return processes("ray::Follower")


@pytest.fixture(scope="module")
def by_value(ray_cluster):
    """Ray's workers cannot import test modules."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def model(untrained_model_path):
    return ModelConfig(path=str(untrained_model_path))


@pytest.fixture
def pool(by_value, model):
    with ModelPool(replace(model, num_shards=2)) as pool:
        yield pool


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory):
    """What one process makes, without Ray: a run directory with counts, masks, learned experts and answers."""
    run = RunDirectory.open(str(tmp_path_factory.mktemp("alone")))
    prepare(run)
    holder = ModelHolder(model, 1)
    job = CaptureJob(model=model, config=GENERATED, run_url=run.folder.url, session="alone")
    work = CaptureActor(holder, job)
    with work.in_force():
        work(np.arange(len(run.stored_batches.columns("id"))))
    counts = read_counts(run.counts_folder)
    masks = pipeline.identify(
        counts, config=by_prompt_tokens(permutations=0, resamples=0, threshold=0.0, top_k=6)
    ).masks
    write_masks(run.sub(IDENTIFY), masks)
    training = FinetuneConfig(epochs=2, num_workers=0, learning_rate=1e-2)
    finetune(FinetuneJob(model=model, config=training, seed=0, run_url=run.folder.url))
    return run


def prepare(run):
    records = [
        {name: value for name, value in record.items() if name != "response"}
        for record in embedded_records("train")
        if record["category"] in ("fraud", "theft")
    ]
    batches = assemble_batches(records_to_examples(records)).batches[:2]
    run.sub(PROMPTS).write_table(BATCHES, batches_to_frame(batches))
    for name in (QUARANTINE, TRUNCATED):
        run.sub(CAPTURE).write_table(name, quarantine_frame([]))


def captured(run):
    """Counts in order, and responses by example."""
    counts = read_counts(run.counts_folder)
    texts = pd.concat([run.sub(RESPONSES).read_frame(name) for name in run.sub(RESPONSES).parquet_names()])
    return counts, texts.sort_values(["batch_idx", "in_batch_idx"])["response"].tolist()


def assert_same_capture(run, expected):
    (counts, texts), (wanted, wanted_texts) = captured(run), captured(expected)
    assert np.array_equal(counts.counts_NLE, wanted.counts_NLE)
    assert texts == wanted_texts
    assert any(texts)


def test_it_captures_and_answers_as_one_process_does(pool, model, expected, tmp_path):
    run = RunDirectory.open(str(tmp_path / "run"))
    prepare(run)
    with pool.working([None], Look, None, what="looking") as results:
        ((leader, others, share),) = results
    assert len(others) == 1
    assert share == pytest.approx(0.5, abs=0.01)
    capture(run, pool.model, GENERATED, models=pool)
    assert_same_capture(run, expected)
    examples = records_to_examples(embedded_records("test"))
    chosen = [[example for example in examples if example.label == label][:3] for label in ("safe", "unsafe")]
    held_out = examples_to_frame([*chosen[0], *chosen[1]]).assign(batch_idx=0)
    job = AnswerJob(
        model=pool.model, config=EvaluateConfig(max_new_tokens=4), run_url=expected.folder.url, parts="before",
        masks=IDENTIFY, count=True,
    )  # fmt: skip
    after = replace(job, parts="after", adapter=FINETUNE)
    routing, texts = ("natural", "masked"), ["A harmless text."]
    for asked in (job, after):
        found = answer(held_out, asked, what=asked.parts, routing=routing, neutral=texts, models=pool)
        alone = replace(asked, model=model, parts=f"{asked.parts}_alone")
        wanted = answered_here(held_out, alone, routing, texts)
        assert found.answers["answer"].tolist() == wanted.answers["answer"].tolist()
        for name in ("target_loss", "routing"):
            assert found.answers[name].equals(wanted.answers[name])
        assert found.neutral["loss"].equals(wanted.neutral["loss"])
        assert np.array_equal(found.routing.counts_NLE, wanted.routing.counts_NLE)
        firsts = [done.first_tokens.sort_values("id", ignore_index=True) for done in (found, wanted)]
        pd.testing.assert_frame_equal(*firsts)
    before, later = (read_answers(expected.sub(name)).answers for name in ("before", "after"))
    assert not before["target_loss"].equals(later["target_loss"])
    with pool.working([None], Look, None, what="looking") as results:
        assert [seen[0] for seen in results] == [leader]
    assert pool.size == 1
    pool.release()
    assert_gone(others)


def answered_here(held_out, job, routing, texts):
    """The same rows by this process."""
    from moe_ray.evaluation.evaluate import rows_to_answer
    from moe_ray.orchestration.jobs.answer import _COLUMNS, _text_row

    rows = rows_to_answer(held_out, routing, job.config.samples)[_COLUMNS]
    rows = pd.concat([rows, pd.DataFrame([_text_row(index, text) for index, text in enumerate(texts)])])
    work = AnswerActor(ModelHolder(job.model, 1), job)
    with work.in_force():
        for block in blocks_of(as_table(rows), len(rows)):
            work(block)
    return read_answers(work.parts)


def assert_gone(pids):
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < deadline, pids
        time.sleep(0.05)


@pytest.mark.exhaustive
def test_a_run_in_which_no_process_has_the_whole_model_ends_as_one_in_which_one_has(
    ray_cluster, untrained_model_path, tmp_path, monkeypatch
):
    def settings(name, *more):
        # The model has learned nothing, so no threshold is sure to be passed.
        return settings_of_run(untrained_model_path, tmp_path / name, "identify.threshold=0", "ablate.run=true", *more)

    spread = ["model.num_shards=2", "finetune.shard=fsdp", "finetune.num_workers=2", "finetune.batches_per_step=2"]
    alone = ["finetune.num_workers=1", "finetune.batches_per_step=2"]
    assert run_workflow("evaluate", settings("spread", *spread)) == 0
    assert run_workflow("evaluate", settings("alone", *alone)) == 0
    found, wanted = (RunDirectory.open(str(tmp_path / name)) for name in ("spread", "alone"))
    assert np.array_equal(read_counts(found.counts_folder).counts_NLE, read_counts(wanted.counts_folder).counts_NLE)
    assert found.masks.digest() == wanted.masks.digest()
    for when in ("before", "after"):
        answers, expected = (
            run.sub(f"evaluate/{when}/figures").read_frame("answers.parquet") for run in (found, wanted)
        )
        assert answers["answer"].tolist() == expected["answer"].tolist()
        np.testing.assert_allclose(answers["target_loss"], expected["target_loss"], atol=1e-4)
    # How many processes held the model is nothing that a result depends on.
    monkeypatch.setattr("moe_ray.orchestration.jobs.capture.capture", must_not_be_called)
    monkeypatch.setattr("moe_ray.orchestration.jobs.answer.answer", must_not_be_called)
    assert run_workflow("evaluate", settings("spread", *alone)) == 0


@pytest.mark.exhaustive
class TestEnds:
    """A group ends as one, whichever of its processes does, and as quickly."""

    def test_an_error_of_ours_comes_as_it_was_raised_and_ends_all_of_them(self, pool):
        before = ray.available_resources()["CPU"]
        with pytest.raises(InputError, match=r"^block 7 is wrong$"), working(pool, [7], Fails) as results:
            list(results)
        assert pool.size == 0
        assert ray.available_resources()["CPU"] == before

    def test_a_pass_that_breaks_off_is_said_and_keeps_nobody_waiting(self, pool):
        with (
            pytest.raises(PassBroken, match=r"OutOfMemoryError: no room; where memory"),
            working(pool, [1], Breaks) as results,
        ):
            list(results)
        assert pool.size == 0

    @pytest.mark.parametrize("whom", ["leader", "other"])
    def test_one_that_is_killed_at_work_takes_its_group_along_and_loses_no_block(self, pool, tmp_path, whom):
        with working(pool, list(range(4)), Kills, (str(tmp_path / "killed"), whom)) as results:
            assert sorted(results) == [0, 1, 2, 3]
        with working(pool, [None], Look) as results:
            ((leader, others, _),) = results
        assert len(others) == 1
        assert leader not in others

    @pytest.mark.parametrize("whom", ["ray::ModelActor", "ray::Follower"])
    def test_a_capture_whose_process_is_killed_counts_every_example_once(self, pool, expected, tmp_path, whom):
        run = RunDirectory.open(str(tmp_path / "run"))
        prepare(run)
        killed: list[int] = []
        killer = threading.Thread(target=kill_when_counting, args=(run, whom, killed))
        killer.start()
        capture(run, pool.model, GENERATED, models=pool)
        killer.join()
        assert len(killed) == 1
        assert_same_capture(run, expected)


def working(pool, blocks, kind, job=None):
    return pool.working(blocks, kind, job, what="working")


def kill_when_counting(run, title, killed):
    """Ends a process the hard way when the capture has noted what it is trying."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if run.sub(ATTEMPTS).names():
            (pid,) = processes(title)
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
            return
        time.sleep(0.005)

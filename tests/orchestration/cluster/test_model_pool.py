"""The model processes of a run: the same ones for every stage, the base model between jobs, and nothing lost with one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch
from counting_alone import count_batches
from paths import ROOT, TESTS
from prompt_tokens import by_prompt_tokens
from safetensors.torch import save_file

from moe_ray import pipeline
from moe_ray.config.capture import CaptureConfig
from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.config.finetune import FinetuneConfig
from moe_ray.config.model import ModelConfig
from moe_ray.demo.examples import embedded_records
from moe_ray.errors import InputError, OutsideFailed
from moe_ray.finetuning.frozen import hash_frozen
from moe_ray.identification.mask_files import write_masks
from moe_ray.models.loading import load_model, load_tokenizer
from moe_ray.orchestration.cluster import model_pool, pool_process
from moe_ray.orchestration.cluster.model_actor import ModelActor, ModelWork
from moe_ray.orchestration.cluster.model_pool import ModelPool
from moe_ray.orchestration.cluster.pool_process import PoolProcess
from moe_ray.orchestration.jobs.answer import answer
from moe_ray.orchestration.jobs.answer_job import AnswerJob
from moe_ray.orchestration.jobs.capture import capture
from moe_ray.orchestration.jobs.finetune import FinetuneJob, finetune
from moe_ray.prompts.batches import assemble_batches
from moe_ray.prompts.example_tables import BATCHES, batches_to_frame, examples_to_frame
from moe_ray.prompts.examples import records_to_examples
from moe_ray.prompts.quarantine import QUARANTINE, TRUNCATED, quarantine_frame
from moe_ray.routing.count_store import read_counts
from moe_ray.run_directory import CAPTURE, FINETUNE, IDENTIFY, PROMPTS, RunDirectory

ray_test = [pytest.mark.needs_ray, pytest.mark.slow, pytest.mark.filterwarnings("default")]


class Look(ModelWork):
    """Which process this is, and the hashes of every number of its model."""

    def __call__(self, block):
        model = self.holder.model
        return os.getpid(), hash_frozen(model, np.zeros((3, 24), dtype=bool)), model.training


class Meet(ModelWork):
    """Waits until so many processes have come to one place, and says how many calls are at work in this one."""

    def __call__(self, block):
        folder, wanted = self.job
        Path(folder, str(os.getpid())).touch()
        deadline = time.monotonic() + 60
        while len(list(Path(folder).iterdir())) < wanted and time.monotonic() < deadline:
            time.sleep(0.02)
        return os.getpid()


@dataclass(frozen=True)
class Deadly:
    """The first call that finds no marker leaves one and ends its process."""

    marker: str


class DiesOnce(ModelWork):
    def __call__(self, block):
        marker = Path(self.job.marker)
        if block == 2 and not marker.exists():
            marker.touch()
            os._exit(1)
        return block, os.getpid()


class Fails(ModelWork):
    def __call__(self, block):
        raise InputError(f"block {block} is wrong")


@pytest.fixture(scope="module")
def by_value(ray_cluster):
    """Ray's workers cannot import test modules."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def model(untrained_model_path):
    return ModelConfig(path=str(untrained_model_path))


@pytest.fixture
def pool(by_value, model):
    with ModelPool(model) as pool:
        yield pool


def look(pool):
    with pool.working([None], Look, None, what="looking") as results:
        ((pid, hashes, is_training),) = results
    assert not is_training
    return pid, hashes


@pytest.fixture(scope="module")
def prepared(untrained_model_path, tmp_path_factory):
    """A run directory with batches and their masks, and held-out rows."""
    model = ModelConfig(path=str(untrained_model_path))
    run = RunDirectory.open(str(tmp_path_factory.mktemp("run")))
    records = [record for record in embedded_records("train") if record["category"] in ("fraud", "theft")]
    batches = assemble_batches(records_to_examples(records)).batches[:3]
    run.sub(PROMPTS).write_table(BATCHES, batches_to_frame(batches))
    for name in (QUARANTINE, TRUNCATED):
        run.sub(CAPTURE).write_table(name, quarantine_frame([]))
    counts = count_batches(load_model(model, device="cpu"), load_tokenizer(model), batches)
    masks = pipeline.identify(
        counts, config=by_prompt_tokens(permutations=0, resamples=0, threshold=0.0, top_k=6)
    ).masks
    write_masks(run.sub(IDENTIFY), masks)
    held_out = examples_to_frame(records_to_examples(embedded_records("test"))[:10]).assign(batch_idx=0)
    return run, held_out, counts


class TestWithRay:
    pytestmark = ray_test

    def test_one_process_does_every_stage_and_holds_the_base_model_bit_for_bit_between_them(
        self, pool, model, prepared
    ):
        run, held_out, counts = prepared
        url = run.folder.url
        answers = AnswerJob(
            model=model, config=EvaluateConfig(max_new_tokens=4), run_url=url, parts="before",
            masks=IDENTIFY, count=True,
        )  # fmt: skip
        after = AnswerJob(**{**vars(answers), "parts": "after", "adapter": FINETUNE})
        training = FinetuneJob(model=model, config=FinetuneConfig(epochs=2), seed=0, run_url=url)
        first = look(pool)
        capture(run, model, CaptureConfig(generate=False), models=pool)
        looks = [look(pool)]
        kept = [answer(held_out, answers, what="before", models=pool).answers]
        finetune(training, pool)
        looks.append(look(pool))
        kept.append(answer(held_out, after, what="after", models=pool).answers)
        looks.append(look(pool))
        assert looks == [first] * 3
        assert pool.size == 1
        fresh = load_model(model, device="cpu")
        assert first[1] == hash_frozen(fresh, np.zeros((3, 24), dtype=bool))
        assert np.array_equal(read_counts(run.counts_folder).counts_NLE, counts.counts_NLE)
        # Processes that do one thing each answer the same, to the last bit.
        alone = [AnswerJob(**{**vars(job), "parts": f"{job.parts}_alone"}) for job in (answers, after)]
        for job, expected in zip(alone, kept, strict=True):
            assert answer(held_out, job, what="alone").answers.equals(expected)
        assert not kept[0]["target_loss"].equals(kept[1]["target_loss"])

    def test_training_in_a_model_process_leaves_the_same_files_as_in_this_one(self, pool, model, prepared):
        run, *_ = prepared
        config = FinetuneConfig(epochs=2)
        jobs = [
            FinetuneJob(model=model, config=settings, seed=0, run_url=run.folder.url, out=out)
            for settings, out in ((config, "pooled"), (FinetuneConfig(epochs=2, num_workers=0), "here"))
        ]
        assert [finetune(job, pool)["frozen_parameters_changed"] for job in jobs] == [0, 0]
        pooled, here = (job.folder().read_bytes("experts.safetensors") for job in jobs)
        assert pooled == here
        assert not any(job.folder().exists("checkpoints") for job in jobs)

    def test_a_process_killed_between_jobs_is_started_again(self, pool):
        pid, hashes = look(pool)
        os.kill(pid, 9)
        again = look(pool)
        assert again[0] != pid
        assert again[1] == hashes

    def test_a_process_that_dies_at_work_loses_and_doubles_no_block(self, pool, tmp_path):
        with pool.working(list(range(5)), DiesOnce, Deadly(str(tmp_path / "died")), what="dying") as results:
            done = list(results)
        assert (tmp_path / "died").exists()
        assert sorted(block for block, _ in done) == [0, 1, 2, 3, 4]
        assert len({pid for _, pid in done}) == 2

    def test_more_processes_are_started_while_there_is_work_and_stay(self, pool, tmp_path):
        with pool.working([0, 1], Meet, (str(tmp_path), 2), what="meeting", max_processes=2) as results:
            assert len(set(results)) == 2
        assert pool.size == 2

    def test_calls_overlap_in_one_process_where_the_work_may(self, pool, tmp_path):
        class Both(ModelWork):
            def __call__(self, block):
                Path(self.job, str(block)).touch()
                deadline = time.monotonic() + 60
                while len(list(Path(self.job).iterdir())) < 2:
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
                return os.getpid()

        with pool.working([0, 1], Both, str(tmp_path), what="overlapping", overlaps=True) as results:
            assert len(set(results)) == 1

    def test_what_a_result_says_decides_what_comes_next(self, pool, tmp_path):
        """The next block is asked for after the result before it was seen."""
        seen = [1]

        def blocks():
            while len(seen) < 6:
                yield seen[-1] + 1

        with pool.working(blocks(), DiesOnce, Deadly(str(tmp_path)), what="asking") as results:
            for block, _ in results:
                seen.append(block)
        assert seen == [1, 2, 3, 4, 5, 6]

    def test_no_blocks_need_no_result(self, pool):
        with pool.working([], Look, None, what="nothing") as results:
            assert list(results) == []

    def test_processes_beyond_what_there_is_room_for_are_not_waited_for(self, pool):
        with pool.working([None], Look, None, what="looking", max_processes=99) as results:
            assert len(list(results)) == 1
        assert 1 <= pool.size <= 4

    def test_an_error_of_ours_comes_as_it_was_raised_and_ends_the_processes(self, pool):
        before = ray.available_resources()["CPU"]
        with (
            pytest.raises(InputError, match=r"^block 7 is wrong$"),
            pool.working([7], Fails, None, what="x") as results,
        ):
            list(results)
        assert pool.size == 0
        assert ray.available_resources()["CPU"] == before

    def test_a_model_that_cannot_be_loaded_is_named(self, by_value):
        with (
            ModelPool(ModelConfig(path="/nowhere/at/all")) as pool,
            pytest.raises(InputError, match="/nowhere/at/all"),
            pool.working([1], Fails, None, what="x") as results,
        ):
            list(results)

    def test_what_the_processes_held_is_free_when_they_are_given_back(self, pool):
        before = ray.available_resources()["CPU"]
        look(pool)
        assert ray.available_resources()["CPU"] == before - 1
        pool.make_room(cpus=before - 1)
        assert pool.size == 1
        pool.make_room(cpus=before)
        assert pool.size == 0
        assert ray.available_resources()["CPU"] == before

    def test_more_processes_than_a_local_ray_has_cpus_for_are_refused_before_one_starts(self, pool):
        with (
            pytest.raises(InputError, match="looking needs 99 logical CPUs"),
            pool.working([1], Look, None, what="looking", num_processes=99),
        ):
            pass
        assert pool.size == 0

    def test_a_process_keeps_no_other_stage_from_its_gpu(self, untrained_model_path):
        done = subprocess.run(
            [sys.executable, "-c", ONE_GPU, str(untrained_model_path)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS), *sys.path])},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.stdout.split("\n")[-2:] == ["held True free 0.0; then held False, trained on 1.0", ""], done.stderr


# A Ray that believes it has one GPU; the model itself is on the CPU, as no GPU is found.
ONE_GPU = """
import sys
import ray
from moe_ray.config.model import ModelConfig
from moe_ray.orchestration.cluster.model_actor import ModelWork
from moe_ray.orchestration.cluster.model_pool import ModelPool
from moe_ray.orchestration.cluster.ray_session import free_resources

ray.init(address="local", num_cpus=3, num_gpus=1, include_dashboard=False, logging_level="error", log_to_driver=False)


class Gpus(ModelWork):
    def __call__(self, block):
        return ray.get_runtime_context().get_assigned_resources().get("GPU", 0.0)


@ray.remote(num_gpus=1, num_cpus=1)
def train():
    return ray.get_runtime_context().get_assigned_resources()["GPU"]


pool = ModelPool(ModelConfig(path=sys.argv[1]))
with pool.working([0], Gpus, None, what="answers", gpus=1.0) as results:
    held = list(results) == [1.0]
free = free_resources("GPU")
pool.make_room(gpus=0.5)
print(f"held {held} free {free}; then held {pool.size > 0}, trained on {ray.get(train.remote(), timeout=60)}")
"""


class TestWithoutRay:
    @pytest.fixture
    def started(self, monkeypatch):
        """A pool whose processes are names; what Ray would have free."""
        free = {"CPU": 4.0, "GPU": 0.0}
        killed = []
        monkeypatch.setattr(model_pool, "free_resources", lambda name: free[name])
        monkeypatch.setattr(pool_process, "ray", SimpleNamespace(kill=killed.append))
        pool = ModelPool(ModelConfig())

        def start_one():
            pool._processes.append(PoolProcess(f"process {len(pool._processes)}"))

        monkeypatch.setattr(pool, "_start_one", start_one)
        return pool, free, killed

    def test_nothing_is_started_before_it_is_asked_for(self, started):
        pool, _, killed = started
        pool.make_room(cpus=99, gpus=1)
        pool.release()
        assert (pool.size, killed) == (0, [])

    def test_it_grows_to_what_a_stage_wants_and_does_not_shrink(self, started):
        pool, _, killed = started
        sizes = []
        for wanted in (2, 1, 3):
            pool.start(wanted)
            sizes.append(pool.size)
        assert (sizes, killed) == ([2, 2, 3], [])

    def test_processes_with_another_number_of_gpus_replace_the_ones_before(self, started):
        pool, _, killed = started
        pool.start(2, gpus=0.5)
        pool.start(1, gpus=1.0)
        assert (pool.size, killed) == (1, ["process 0", "process 1"])

    @pytest.mark.parametrize(("held", "stays"), [(4, True), (5, False)])
    def test_tasks_get_half_of_the_cpus_at_least(self, started, held, stays, monkeypatch):
        pool, free, _ = started
        monkeypatch.setattr(model_pool, "all_cpus", lambda: 8.0)
        free["CPU"] = 8.0 - held
        pool.make_room_for_tasks()
        pool.start(held)
        pool.make_room_for_tasks()
        assert (pool.size > 0) is stays

    @pytest.mark.parametrize(
        ("held", "wanted", "stays"),
        [
            # GPUs of each process; what another stage wants; whether the pool may stay.
            (0.0, {"cpus": 4.0}, True),
            (0.0, {"cpus": 4.5}, False),
            (0.0, {"cpus": 1.0, "gpus": 1.0}, True),
            (0.5, {"gpus": 1.0}, False),
            (0.5, {"cpus": 4.0}, True),
        ],
    )
    def test_it_makes_room_where_another_stage_needs_what_it_holds(self, started, held, wanted, stays):
        pool, *_ = started
        pool.start(1, gpus=held)
        pool.make_room(**wanted)
        assert (pool.size == 1) is stays


@pytest.mark.needs_ray
@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_model_that_does_not_fit_is_loaded_twice_and_then_said(ray_cluster, tmp_path, monkeypatch):
    class DiesLoading(ModelActor):
        """Ends as a process does that the system takes the memory from."""

        def load(self):
            with Path(self._model.path, "loads").open("a") as log:
                log.write("x")
            os._exit(137)

    (tmp_path / "config.json").write_text("{}")
    save_file({"w": torch.zeros(1000, 1000)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(pool_process, "ModelActor", DiesLoading)
    with (
        ModelPool(ModelConfig(path=str(tmp_path))) as pool,
        pytest.raises(
            InputError, match=r"ended twice while it loaded .* 0\.0 GB in each of 1 processes.* free of"
        ) as error,
        pool.working([1], Look, None, what="looking") as results,
    ):
        list(results)
    assert "model.dtype=bfloat16" in str(error.value)
    assert (tmp_path / "loads").read_text() == "xx"


class EndsItsProcess(ModelWork):
    """What the system does to a process where memory runs out."""

    def __call__(self, block):
        with Path(self.job).open("a") as log:
            log.write("x")
        os._exit(137)


@pytest.mark.needs_ray
@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_work_that_ends_its_process_each_time_is_said_in_a_sentence(pool, tmp_path):
    with (
        pytest.raises(
            OutsideFailed, match=r"^fine-tuning: a model process ended twice .* free of .*; run the same command again"
        ),
        pool.working([1], EndsItsProcess, str(tmp_path / "log"), what="fine-tuning", resumes=True) as results,
    ):
        list(results)
    assert (tmp_path / "log").read_text() == "xx"

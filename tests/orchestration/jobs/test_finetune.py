"""Training in a model process and in Ray Train workers: killed ones resume, and all end with the same weights."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray.train
import torch
from counting_alone import count_batches
from prompt_tokens import by_prompt_tokens
from safetensors.torch import load_file

from moe_ray import pipeline
from moe_ray.config.finetune import FinetuneConfig
from moe_ray.config.model import ModelConfig
from moe_ray.demo.examples import embedded_records
from moe_ray.errors import FrozenChanged, InputError
from moe_ray.finetuning.history import HISTORY, HistoryWriter, read_history
from moe_ray.identification.mask_files import write_masks
from moe_ray.models.loading import load_model, load_tokenizer
from moe_ray.orchestration.jobs import finetune as training
from moe_ray.orchestration.jobs.finetune import FinetuneJob, finetune
from moe_ray.orchestration.jobs.ray_train import _error_of_worker
from moe_ray.prompts.batches import assemble_batches
from moe_ray.prompts.example_tables import BATCHES, batches_to_frame
from moe_ray.prompts.examples import records_to_examples
from moe_ray.prompts.quarantine import QUARANTINE, TRUNCATED, quarantine_frame
from moe_ray.run_directory import CAPTURE, IDENTIFY, PROMPTS, RunDirectory
from moe_ray.storage.folder import Folder

pytestmark = [pytest.mark.needs_ray, pytest.mark.slow, pytest.mark.filterwarnings("default")]

# Threads may split a sum differently in another process; learned weights are of order 0.1.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def job(tiny_model_path, tmp_path_factory):
    """A small job whose inputs are on disk; `out` is for each test to set."""
    root = tmp_path_factory.mktemp("job")
    model = ModelConfig(path=str(tiny_model_path))
    records = [record for record in embedded_records("train") if record["category"] in ("fraud", "theft")]
    batches = assemble_batches(records_to_examples(records)).batches[:6]
    counts = count_batches(load_model(model, device="cpu"), load_tokenizer(model), batches)
    run = RunDirectory.open(str(root))
    write_masks(
        run.sub(IDENTIFY), pipeline.identify(counts, config=by_prompt_tokens(permutations=0, resamples=0)).masks
    )
    run.sub(PROMPTS).write_table(BATCHES, batches_to_frame(batches))
    for name in (QUARANTINE, TRUNCATED):
        run.sub(CAPTURE).write_table(name, quarantine_frame([]))
    return FinetuneJob(
        model=model,
        config=FinetuneConfig(epochs=10, checkpoint_every=5, weight_decay=0.01),
        seed=3,
        run_url=run.folder.url,
    )


def own_processes(name):
    """Ids of the processes with `name` in their title that this process or its children started."""
    table = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = {int(pid): (int(parent), args) for pid, parent, args in (line.split(None, 2) for line in table.splitlines())}
    for pid, (parent, args) in rows.items():
        while parent in rows and parent != os.getpid():
            parent = rows[parent][0]
        if parent == os.getpid() and name in args:
            yield pid


def kill_one_once(title, out, killed):
    """Ends a process that trains the hard way when the first checkpointed steps are there."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if (out / HISTORY).exists() and len(read_history(Folder.open(str(out)))) >= 10:
            for pid in own_processes(title):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                return
        time.sleep(0.01)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("title", "num_workers", "shard"),
    [("ray::ModelActor", 1, "none"), ("RayTrainWorker", 2, "none"), ("RayTrainWorker", 2, "fsdp")],
)
def test_a_killed_process_resumes_and_ends_with_the_weights_of_an_uninterrupted_run(
    title, num_workers, shard, ray_cluster, job
):
    config = replace(job.config, batches_per_step=num_workers, num_workers=num_workers, shard=shard)
    interrupted = replace(job, out=f"interrupted_{num_workers}_{shard}", config=config)
    alone = replace(job, out=f"alone_{num_workers}_{shard}", config=replace(config, num_workers=0, shard="none"))
    finetune(alone)
    killed = []
    killer = threading.Thread(target=kill_one_once, args=(title, Path(interrupted.folder().path), killed))
    killer.start()
    outcome = finetune(interrupted)
    killer.join()
    assert killed
    steps = [step["step"] for step in read_history(interrupted.folder())]
    assert steps == list(range(60 // num_workers))
    assert outcome["frozen_parameters_changed"] == 0
    assert_same_weights(Path(interrupted.folder().path), Path(alone.folder().path))


def test_a_run_killed_in_training_goes_on_from_its_last_checkpoint(job, monkeypatch):
    interrupted = replace(job, out="killed", config=replace(job.config, num_workers=0, epochs=2))
    alone = replace(interrupted, out="not_killed")
    with monkeypatch.context() as patched:
        patched.setattr(training, "HistoryWriter", dies_after(7))
        with pytest.raises(KeyboardInterrupt):
            finetune(interrupted)
    again = []
    monkeypatch.setattr(training, "HistoryWriter", telling(again.append))
    finetune(interrupted)
    assert again == list(range(5, 12))
    finetune(alone)
    assert interrupted.folder().read_bytes("experts.safetensors") == alone.folder().read_bytes("experts.safetensors")
    assert [step["step"] for step in read_history(interrupted.folder())] == list(range(12))


def telling(tell):
    """The writer of a training's history, which also says the number of each step that it is given."""

    class Telling(HistoryWriter):
        def add(self, line):
            tell(line["step"])
            super().add(line)

    return Telling


def dies_after(steps):
    def tell(step):
        if step == steps:
            raise KeyboardInterrupt

    return telling(tell)


def test_one_worker_on_the_cpu_needs_no_ray_train(ray_cluster, job, monkeypatch):
    monkeypatch.setitem(sys.modules, "moe_ray.orchestration.jobs.ray_train", None)
    one = replace(job, out="one", config=replace(job.config, epochs=1))
    assert finetune(one)["frozen_parameters_changed"] == 0
    two = replace(job, out="two", config=replace(job.config, epochs=1, num_workers=2))
    with pytest.raises(ImportError):
        finetune(two)
    on_gpu = replace(job, out="two", config=replace(job.config, epochs=1, gpus_per_worker=1))
    # One on a GPU trains in a model process too, where there is one.
    with pytest.raises(InputError, match="needs 1 GPUs"):
        finetune(on_gpu)


@pytest.fixture(scope="module")
def shared(ray_cluster, job):
    """Two workers that share each step's two batches."""
    both = replace(job, out="shared", config=replace(job.config, num_workers=2, batches_per_step=2, epochs=2))
    finetune(both)
    return Path(both.folder().path)


def test_two_workers_end_with_the_weights_of_one(job, shared):
    alone = replace(job, out="alone", config=replace(job.config, num_workers=0, batches_per_step=2, epochs=2))
    finetune(alone)
    assert_same_weights(shared, Path(alone.folder().path))


def test_two_workers_over_which_the_model_is_sharded_end_with_the_weights_of_one(ray_cluster, job, shared):
    sharded = replace(job, out="sharded", config=replace(job.config, num_workers=2, epochs=2, shard="fsdp"))
    done = finetune(sharded)
    assert done["frozen_parameters_changed"] == 0
    assert_same_weights(Path(sharded.folder().path), shared)


def test_as_many_workers_as_the_cluster_has_room_for_end_with_the_weights_of_a_fixed_number(ray_cluster, job, shared):
    config = replace(job.config, num_workers=1, max_workers=2, batches_per_step=2, epochs=2)
    elastic = replace(job, out="elastic", config=config)
    seen: list[int] = []
    done = threading.Event()
    watcher = threading.Thread(target=count_until, args=(done, "RayTrainWorker", seen))
    watcher.start()
    try:
        finetune(elastic)
    finally:
        done.set()
        watcher.join()
    assert max(seen) == 2
    assert_same_weights(Path(elastic.folder().path), shared)


def count_until(done, title, seen):
    """How many processes with the title there were, again and again."""
    while not done.wait(0.2):
        seen.append(sum(1 for _ in own_processes(title)))


def test_two_workers_history_has_the_batches_of_both(shared):
    steps = read_history(Folder.open(str(shared)))
    assert [len(step["batches"]) for step in steps] == [2] * 6
    for epoch in (0, 1):
        trained = [batch["batch_idx"] for step in steps if step["epoch"] == epoch for batch in step["batches"]]
        assert sorted(trained) == [0, 1, 2, 3, 4, 5]


def test_a_finished_training_leaves_no_ray_train_state_behind(shared):
    assert not (shared / "ray_train").exists()


def assert_same_weights(left, right):
    first, second = load_file(left / "experts.safetensors"), load_file(right / "experts.safetensors")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], atol=TOLERANCE, rtol=0, msg=name)


def test_what_a_worker_raised_on_purpose_comes_as_what_it_is():
    frozen = FrozenChanged("3 numbers changed")
    in_a_worker = ray.exceptions.RayTaskError("train", "traceback", frozen)
    assert _error_of_worker(ray.train.WorkerGroupError("failed", {0: ValueError("a bug"), 1: in_a_worker})) is frozen
    bug = ray.train.WorkerGroupError("failed", {0: ValueError("a bug")})
    assert _error_of_worker(bug) is bug

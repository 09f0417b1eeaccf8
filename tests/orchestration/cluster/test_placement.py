"""Processes that hold a model go where the settings say, and work that no node could take is refused."""

import json
import os
import subprocess
import sys

import pytest
from paths import ROOT, TESTS

from moe_ray.config.cluster import ClusterConfig
from moe_ray.config.io import load_config
from moe_ray.errors import InputError
from moe_ray.orchestration.cluster.node_share import expected_on_node
from moe_ray.orchestration.cluster.placement import Placement, resources_of_process

NODE = {"Alive": True, "Resources": {"CPU": 8.0, "accelerator_type:H100": 1.0}, "Labels": {"pool": "inference"}}


@pytest.mark.parametrize(
    ("labels", "fits"),
    [
        ({}, True),
        ({"pool": "inference"}, True),
        ({"pool": "training"}, False),
        ({"pool": "in(training, inference)"}, True),
        ({"pool": "!in(training,inference)"}, False),
        ({"pool": "!training", "zone": "!b"}, True),
        ({"pool": "inference", "zone": "b"}, False),
    ],
)
def test_a_nodes_labels_are_held_against_the_selector_as_ray_does(labels, fits):
    assert Placement(node_labels=labels).fits(NODE) is fits


def test_a_kind_of_gpu_is_asked_for_by_processes_that_have_one():
    placement = Placement.of(ClusterConfig(accelerator_type="H100"))
    assert placement.actor_options(2.0) == {"resources": {"accelerator_type:H100": 0.001}, "label_selector": None}
    assert placement.actor_options(0.0) == {"resources": {}, "label_selector": None}
    assert placement.has_gpus(NODE)
    assert not Placement(accelerator_type="T4").has_gpus(NODE)


def test_processes_of_one_kind_of_gpu_share_the_nodes_that_have_it():
    nodes = [
        {"NodeID": name, "Alive": True, "Resources": {"CPU": 64, "GPU": 8, kind: 1.0}}
        for name, kind in (("n0", "accelerator_type:H100"), ("n1", "accelerator_type:T4"))
    ]
    needs = {"CPU": 1.0, "GPU": 1.0, "accelerator_type:H100": 0.001}
    assert expected_on_node(8, needs, nodes, "n0") == 8


def test_labels_are_texts_and_a_sweep_takes_none():
    with pytest.raises(InputError, match=r"cluster\.node_labels.*names of labels, each with a text"):
        load_config(None, ["cluster.node_labels={pool: 1}"])
    with pytest.raises(InputError, match=r"cluster\.node_labels.*sweep\.run=true.*cluster\.accelerator_type"):
        load_config(None, ["cluster.node_labels={pool: a}", "sweep.run=true"])


def test_workers_and_trials_ask_for_memory_on_the_cpu_and_for_a_kind_of_gpu_on_gpus(monkeypatch):
    monkeypatch.setattr("moe_ray.orchestration.cluster.placement.memory_to_ask", lambda needed: min(needed, 10**9))
    placement = Placement(accelerator_type="H100")
    on_gpu = {"GPU": 0.5, "accelerator_type:H100": 0.001}
    assert resources_of_process(0.5, 10**8, placement) == on_gpu
    assert resources_of_process(0.0, 10**8, placement) == {"memory": 1e8}
    assert resources_of_process(0.0, 10**12, placement) == {"memory": 1e9}
    assert resources_of_process(0.0, 0, placement) == {}


@pytest.mark.needs_ray
@pytest.mark.slow
@pytest.mark.exhaustive
def test_actors_workers_and_trials_ask_for_gpus_of_the_kind_labels_and_memory(untrained_model_path, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", TWO_GPUS, str(untrained_model_path), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS), *sys.path])},
        capture_output=True,
        text=True,
        timeout=900,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stderr
    found = json.loads(lines[-1])
    assert found["actor"] == {"CPU": 1.0, "GPU": 1.0, "accelerator_type:H100": 0.001}
    assert found["engine"] == found["actor"]
    assert found["baseline"] == {"CPU": 1.0, "memory": 5e7}
    assert found["worker"] == {"CPU": 1.0, "memory": 1e8}
    assert found["trial"] == {"CPU": 1.0, "GPU": 1.0, "accelerator_type:H100": 0.001}
    assert "no node has such GPUs, got H100" in found["wrong_kind"]
    assert "no node has these labels, got" in found["wrong_label"]


# A Ray that believes it has two GPUs of a kind, on a node with a label; the model itself is on the CPU.
TWO_GPUS = """
import json, sys
import ray
from ray import tune
from moe_ray.config.finetune import FinetuneConfig
from moe_ray.config.model import ModelConfig
from moe_ray.errors import InputError
from moe_ray.orchestration.cluster.actor_pool import in_actors
from moe_ray.orchestration.cluster.engine_process import engine_pool
from moe_ray.orchestration.cluster.model_actor import ModelWork
from moe_ray.orchestration.cluster.model_pool import ModelPool
from moe_ray.orchestration.cluster.placement import Placement, resources_of_process
from moe_ray.orchestration.jobs.ray_train import train_with_ray
from moe_ray.storage.folder import Folder

ray.init(
    address="local", num_cpus=5, num_gpus=2, resources={"accelerator_type:H100": 1}, labels={"pool": "inference"},
    include_dashboard=False, logging_level="error", log_to_driver=False,
)
model, placement = ModelConfig(path=sys.argv[1]), Placement(node_labels={"pool": "inference"}, accelerator_type="H100")


def asked(*_):
    known = ("CPU", "GPU", "memory")
    had = ray.get_runtime_context().get_assigned_resources()
    return {name: amount for name, amount in had.items() if name in known or name.startswith("accelerator_type:")}


class Asked(ModelWork):
    def __call__(self, block):
        return asked()


def refused(placement):
    try:
        with ModelPool(model, placement=placement).working([0], Asked, None, what="answers", gpus=1.0):
            return "nothing"
    except InputError as error:
        return str(error)


class Make:
    def __call__(self, block):
        return asked()


found = {
    "wrong_kind": refused(Placement(accelerator_type="T4")),
    "wrong_label": refused(Placement(node_labels={"pool": "x"})),
}
with ModelPool(model, placement=placement, memory=10**8) as pool:
    with pool.working([0], Asked, None, what="answers", gpus=1.0) as results:
        (found["actor"],) = results
    engines = engine_pool(model, pool, gpus=1.0)
    assert pool.size == 0
    engines._load = None  # what it holds is not the point
    with engines, engines.working([0], Asked, None, what="answers", gpus=1.0) as results:
        (found["engine"],) = results
with in_actors([0], Make, (), what="compare", num_actors=1, memory=5 * 10**7, placement=placement) as results:
    (found["baseline"],) = results


def loop(job, worker):
    return asked()


out = Folder.open(sys.argv[2])
config = FinetuneConfig(num_workers=2, gpus_per_worker=0.0)
found["worker"] = train_with_ray(loop, None, config, out, memory=10**8, placement=placement)


def trial(config):
    tune.report({"asked": json.dumps(asked())})


resources = {"CPU": 1.0, **resources_of_process(1.0, 2 * 10**8, placement)}
tuner = tune.Tuner(
    tune.with_resources(trial, resources),
    run_config=tune.RunConfig(storage_path=sys.argv[2], name="trial", verbose=0),
)
(result,) = tuner.fit()
found["trial"] = json.loads(result.metrics["asked"])
print(json.dumps(found))
"""

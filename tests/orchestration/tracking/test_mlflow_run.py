"""MLflow as it is, SQLite and a server that is killed: what a run says of itself is all there in the end."""

from __future__ import annotations

import json
import logging
import re
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import torch
from mlflow_server import Server, load_table
from transformers import PreTrainedModel
from workflow import run_workflow

from moe_ray.config.model import ModelConfig
from moe_ray.config.tracking import TrackingConfig
from moe_ray.errors import InputError, OutsideFailed
from moe_ray.finetuning.adapter import merge_adapter
from moe_ray.orchestration.tracking.logged_model import link_figures
from moe_ray.orchestration.tracking.mlflow_run import MlflowTracker
from moe_ray.orchestration.tracking.outbox import SPOOL
from moe_ray.orchestration.tracking.result_tables import log_tables
from moe_ray.orchestration.tracking.run_log import stage_run, system_metrics
from moe_ray.run_directory import CAPTURE, PROMPTS
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage import STARTED

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

SETTINGS = {"identify.top_k": "50"}


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> Path:
    """An empty MLflow database; making one takes MLflow eight seconds."""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def folder(tmp_path, database) -> Folder:
    """A run directory whose SQLite file is there."""
    (tmp_path / "run").mkdir()
    shutil.copy(database, tmp_path / "mlflow.db")
    return Folder.open(str(tmp_path / "run"))


@pytest.fixture(scope="module")
def server(tmp_path_factory, database):
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(database, folder / "server.db")
    server = Server(folder)
    server.start()
    yield server
    server.kill()


def runs_by_name(uri: str, experiment: str = "moe-ray"):
    client = mlflow.MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    return {run.info.run_name: run for run in client.search_runs([found.experiment_id])}


def test_a_parent_its_stages_and_its_trials_are_nested(folder):
    with MlflowTracker(TrackingConfig(), "parent", folder, settings=SETTINGS) as parent:
        with parent.child("stage", {"kind": "x"}) as stage, stage.child("trial") as trial:
            trial.log_metrics(
                [(step, {"loss": 1.0 / (1 + step), "none": None, "nan": float("nan")}) for step in range(3)]
            )
        frame = pd.DataFrame({"id": ["a", "b"], "text": ["secret", "words"]})
        parent.log_dataset(frame, name="batches", source="/x/batches.parquet", context="training")
        parent.log_bytes("figure.svg", b"<svg/>", "figures")
    runs = runs_by_name(parent.uri)
    parents = {name: run.data.tags.get("mlflow.parentRunId") for name, run in runs.items()}
    assert parents == {"parent": None, "stage": parent.run_id, "trial": stage.run_id}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert runs["parent"].data.params == SETTINGS
    assert runs["stage"].data.tags["kind"] == "x"
    client = mlflow.MlflowClient(parent.uri)
    history = client.get_metric_history(trial.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    assert set(runs["trial"].data.metrics) == {"loss"}
    (used,) = runs["parent"].inputs.dataset_inputs
    assert (used.dataset.name, json.loads(used.dataset.profile)["num_rows"]) == ("batches", 2)
    assert "secret" not in str(used.dataset)
    assert [item.path for item in client.list_artifacts(parent.run_id, "figures")] == ["figures/figure.svg"]


def test_the_run_of_a_stage_is_called_as_its_command(folder):
    with MlflowTracker(TrackingConfig(), "commands", folder) as parent:
        for stage in (PROMPTS, CAPTURE):
            with stage_run(parent, stage, folder.sub(stage)):
                pass
    assert {"prepare", "capture"} <= set(runs_by_name(parent.uri))


def test_an_error_ends_the_run_as_failed_and_an_interruption_as_killed(folder):
    def work() -> None:
        with MlflowTracker(TrackingConfig(), "failed", folder) as parent:
            with suppress(KeyboardInterrupt), parent.child("killed"):
                raise KeyboardInterrupt
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    statuses = {
        name: run.info.status for name, run in runs_by_name(f"sqlite:///{Path(folder.path).parent}/mlflow.db").items()
    }
    assert statuses == {"failed": "FAILED", "killed": "KILLED"}


def test_an_unfinished_run_is_gone_on_with_and_a_finished_one_is_followed(folder):
    first = MlflowTracker(TrackingConfig(), "first", folder, settings=SETTINGS)
    again = MlflowTracker(TrackingConfig(), "first", folder, settings=SETTINGS)
    assert again.run_id == first.run_id
    other = MlflowTracker(TrackingConfig(), "other", folder, settings={"identify.top_k": "9"})
    assert other.run_id != first.run_id
    other.end()
    last = MlflowTracker(TrackingConfig(), "last", folder, settings={"identify.top_k": "9"})
    last.end()
    tags = runs_by_name(last.uri)["last"].data.tags
    assert tags["moe_ray.previous_run"] == other.run_id != last.run_id


@pytest.mark.parametrize("top_k", ["50", "51"])
def test_what_a_killed_run_left_running_is_ended(folder, top_k):
    killed = MlflowTracker(TrackingConfig(), "run", folder, settings=SETTINGS)
    done, stage = killed.child("capture"), killed.child("sweep")
    done.end()
    trial = stage.child("trial 1")
    MlflowTracker(TrackingConfig(), "run", folder, settings={"identify.top_k": top_k})
    client = mlflow.MlflowClient(killed.uri)
    status = {run.run_id: client.get_run(run.run_id).info.status for run in (killed, done, stage, trial)}
    goes_on = top_k == SETTINGS["identify.top_k"]
    assert list(status.values()) == ["RUNNING" if goes_on else "KILLED", "FINISHED", "KILLED", "KILLED"]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"uri": 1}', "\udcff"])
def test_a_record_that_is_none_is_named(folder, text):
    folder.write_bytes("mlflow_run.json", text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=r"mlflow_run\.json is damaged or foreign"):
        MlflowTracker(TrackingConfig(), "run", folder, settings=SETTINGS)


def test_a_run_that_was_deleted_meanwhile_is_not_gone_on_with(folder):
    first = MlflowTracker(TrackingConfig(), "first", folder, settings=SETTINGS)
    mlflow.MlflowClient(first.uri).delete_run(first.run_id)
    with MlflowTracker(TrackingConfig(), "second", folder, settings=SETTINGS) as second:
        assert second.run_id != first.run_id


def test_a_refused_item_is_named_and_nothing_else_is_lost(folder, caplog):
    with MlflowTracker(TrackingConfig(), "run", folder) as tracker:
        tracker.log_params({"a": 1})
        tracker.log_params({"a": 2})
        tracker.log_metrics([(0, {"loss": 1.0})])
    run = runs_by_name(tracker.uri)["run"]
    assert (run.data.params, run.data.metrics) == ({"a": "1"}, {"loss": 1.0})
    assert "MLflow refused 1 items: params" in caplog.text


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ({"kind": "painting"}, "no item of this kind is known"),
        ({"kind": "metrics"}, "KeyError|'metrics'"),
        ({"kind": "metrics", "metrics": 3}, "not iterable"),
    ],
)
def test_an_item_of_another_version_is_named_and_holds_up_nothing(folder, item, said, caplog):
    with MlflowTracker(TrackingConfig(), "run", folder) as tracker:
        folder.write_bytes(SPOOL, json.dumps({"destination": tracker.uri, "run": "r", **item}).encode() + b"\n")
    with MlflowTracker(TrackingConfig(), "again", folder) as tracker:
        tracker.log_params({"a": 1})
    assert runs_by_name(tracker.uri)["again"].data.params == {"a": "1"}
    assert re.search(f"MLflow refused {item['kind']}: .*({said})", caplog.text)
    assert not folder.exists(SPOOL)


def test_an_error_of_the_database_is_not_logged_beside_being_raised(folder, caplog):
    with MlflowTracker(TrackingConfig(), "run", folder):
        logger = logging.getLogger("mlflow.store.db.utils")
        logger.warning("seen")
        logger.error("database or disk is full", exc_info=OSError("a hundred lines"))
    assert "seen" in caplog.text
    assert "hundred lines" not in caplog.text


def test_a_remote_run_directory_needs_a_server():
    with pytest.raises(InputError, match=r"tracking\.uri: got none"):
        MlflowTracker(TrackingConfig(), "run", Folder.open("memory://run"))


def test_a_server_that_is_not_there_is_refused_at_once(tmp_path):
    started = time.monotonic()
    with pytest.raises(OutsideFailed, match=r"check tracking\.uri"):
        MlflowTracker(TrackingConfig(uri="http://127.0.0.1:9"), "run", Folder.open(str(tmp_path)))
    assert time.monotonic() - started < 30


def test_the_registered_model_gives_the_merged_models_logits(folder, tmp_path, tiny_model_path, monkeypatch):
    from moe_ray.models.loading import load_model, load_tokenizer
    from moe_ray.orchestration.tracking.registry import register_repaired

    config = ModelConfig(path=str(tiny_model_path), dtype="float32")  # as a run has decided
    base = load_model(config, device="cpu")
    ids = torch.arange(3, 30)[None]
    before = base(ids).logits
    learn_on(base, tmp_path / "adapter")
    with MlflowTracker(TrackingConfig(), "run", folder) as tracker, monkeypatch.context() as patched:
        patched.setattr(PreTrainedModel, "from_pretrained", loaded_nowhere)
        registered = register_repaired(tracker, config, Folder.open(str(tmp_path / "adapter")), "tiny-repaired")
    uri = registered.uri
    assert uri == "models:/tiny-repaired/1"
    merge_adapter(load_model(config, device="cpu"), tmp_path / "adapter", tmp_path / "merged")
    merged = load_model(ModelConfig(path=str(tmp_path / "merged")), device="cpu")
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", tracker.uri)
    loaded = mlflow.transformers.load_model(uri, return_type="components")
    got = loaded["model"].eval()
    got.set_experts_implementation("eager")
    assert torch.equal(got(ids).logits, merged(ids).logits)
    assert not torch.equal(got(ids).logits, before)
    assert loaded["tokenizer"].get_vocab() == load_tokenizer(config).get_vocab()
    (version,) = mlflow.MlflowClient(tracker.uri).search_model_versions("name='tiny-repaired'")
    assert version.run_id == tracker.run_id
    link_figures(tracker, registered.model_id, {"unsafe_refusal_rate": 0.75, "not measured": None}, base="tiny")
    logged = mlflow.MlflowClient(tracker.uri).get_logged_model(registered.model_id)
    assert [(metric.key, metric.value) for metric in logged.metrics] == [("repaired/unsafe_refusal_rate", 0.75)]


def loaded_nowhere(*args, **options):
    raise AssertionError("no process loads a model to register one")


def learn_on(model, folder):
    """An adapter that moves two experts of the model by a known amount; the model is changed too."""
    from moe_ray.experts import Expert, masks_from_experts
    from moe_ray.finetuning.adapter import expert_weights, save_adapter
    from moe_ray.finetuning.adapter_tensors import hash_weights
    from moe_ray.finetuning.trainable_experts import trainable_experts
    from moe_ray.models.moe_layers import find_moe_layers

    layers = find_moe_layers(model)
    experts = [Expert(layers.layers[0], 1), Expert(layers.layers[-1], 3)]
    masks = masks_from_experts({0: experts}, layers=layers.layers, num_experts=layers.num_experts)
    base_hash = hash_weights(expert_weights(model, experts))
    with trainable_experts(model, masks.union) as trainable:
        with torch.no_grad():
            for parameters in trainable.parameters.values():
                for parameter in parameters.values():
                    parameter.add_(0.05)
        save_adapter(folder, trainable, base="tiny", base_hash=base_hash, mask_hash=masks.digest())


def test_a_server_that_is_killed_and_started_again_has_everything_in_the_end(server, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = Folder.open(str(tmp_path))
    with MlflowTracker(TrackingConfig(uri=server.uri, experiment="killed"), "parent", folder) as parent:
        with parent.child("before") as stage:
            stage.log_metrics([(0, {"loss": 3.0})])
            server.kill()
            started = time.monotonic()
            stage.log_metrics([(1, {"loss": 2.0})])
            with stage.child("born in the outage") as trial:
                trial.log_metrics([(0, {"loss": 9.0})])
                trial.log_bytes("plot.svg", b"<svg/>")
            assert time.monotonic() - started < 15
        assert folder.exists(SPOOL)
        server.start()
    assert "MLflow does not answer" in caplog.text
    assert not folder.exists(SPOOL)
    runs = runs_by_name(server.uri, "killed")
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert runs["born in the outage"].data.tags["mlflow.parentRunId"] == stage.run_id == runs["before"].info.run_id
    client = mlflow.MlflowClient(server.uri)
    assert [metric.value for metric in client.get_metric_history(stage.run_id, "loss")] == [3.0, 2.0]
    assert [item.path for item in client.list_artifacts(trial.run_id)] == ["plot.svg"]
    assert not trial.run_id.startswith("pending")


@pytest.mark.needs_ray
@pytest.mark.exhaustive
def test_training_outlives_its_server_and_the_next_run_sends_what_was_kept(
    server, ray_cluster, tiny_model_path, tmp_path, caplog
):
    run_dir = tmp_path / "run"
    arguments = [
        *(f"run_dir={run_dir}", f"model.path={tiny_model_path}", f"tracking.uri={server.uri}"),
        *("prompts.max_batches=2", "prompts.max_test_examples=4", "finetune.epochs=1", "finetune.num_workers=0"),
        *("tracking.experiment=outage", "identify.permutations=200", "identify.resamples=0"),
    ]

    def kill_when_training_begins() -> None:
        while not (run_dir / "finetune" / STARTED).exists():
            time.sleep(0.02)
        server.kill()

    killer = threading.Thread(target=kill_when_training_begins, daemon=True)
    killer.start()
    assert run_workflow("full", arguments) == 0
    killer.join(timeout=10)
    assert "the next run in this directory sends them" in caplog.text
    assert (run_dir / SPOOL).exists()
    first = json.loads((run_dir / "summary.json").read_text())["mlflow_run_id"]
    server.start()
    assert run_workflow("full", arguments) == 0
    assert not (run_dir / SPOOL).exists()

    client = mlflow.MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("outage").experiment_id
    runs = client.search_runs([experiment])
    assert {run.info.status for run in runs} == {"FINISHED"}
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    second, original = parents if parents[1].info.run_id == first else parents[::-1]
    assert original.info.run_id == first
    assert second.data.tags["moe_ray.previous_run"] == first

    stages = {run.info.run_name: run for run in runs if run.data.tags.get("mlflow.parentRunId") == first}
    assert {"prepare", "capture", "identify", "finetune", "evaluate/after/figures"} <= set(stages)
    trained = stages["finetune"]
    steps = [json.loads(line) for line in (run_dir / "finetune" / "history.jsonl").read_text().splitlines()]
    losses = client.get_metric_history(trained.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in losses] == [(step["step"], step["loss"]) for step in steps]
    assert not [run for run in runs if run.data.tags.get("mlflow.parentRunId") == second.info.run_id]
    assert second.data.tags["stage.finetune"].startswith("reused from run ")
    for parent in parents:
        names = {item.path for item in client.list_artifacts(parent.info.run_id, "identify")}
        assert "identify/masks.npz" in names
        assert "report.html" in {item.path for item in client.list_artifacts(parent.info.run_id)}
        assert parent.data.metrics["held_out/unsafe_refusal_rate"] is not None


def test_runs_beside_each_other_share_one_store(tmp_path, database):
    shutil.copy(database, tmp_path / "mlflow.db")
    for name in ("first", "second"):
        with MlflowTracker(TrackingConfig(), name, Folder.open(str(tmp_path / name))) as tracker:
            tracker.log_bytes("figure.svg", b"<svg/>")
    assert set(runs_by_name(f"sqlite:///{tmp_path}/mlflow.db")) == {"first", "second"}
    assert not (tmp_path / "first" / "mlflow").exists()
    assert len(list((tmp_path / "mlflow_artifacts").rglob("figure.svg"))) == 2


def test_a_folder_that_everybody_writes_to_gets_no_store(tmp_path, database):
    tmp_path.chmod(0o777)
    folder = Folder.open(str(tmp_path / "run"))
    (tmp_path / "run" / "mlflow").mkdir()
    shutil.copy(database, tmp_path / "run" / "mlflow" / "mlflow.db")
    with MlflowTracker(TrackingConfig(), "run", folder) as tracker:
        pass
    assert tracker.uri == f"sqlite:///{tmp_path}/run/mlflow/mlflow.db"
    assert not (tmp_path / "mlflow.db").exists()


def test_learned_experts_are_a_model_that_their_figures_belong_to(folder):
    with MlflowTracker(TrackingConfig(), "run", folder) as tracker:
        model_id = link_figures(tracker, None, {"safe_refusal_rate": 0.25}, base="tiny")
    logged = mlflow.MlflowClient(tracker.uri).get_logged_model(model_id)
    assert (logged.name, str(logged.status), logged.source_run_id) == ("learned_experts", "READY", tracker.run_id)
    assert logged.tags["artifacts"] == f"runs:/{tracker.run_id}/finetune"
    assert [(metric.key, metric.value) for metric in logged.metrics] == [("repaired/safe_refusal_rate", 0.25)]


def test_tables_are_those_that_mlflow_loads_and_a_second_try_replaces_them(folder):
    table = pd.DataFrame({"batch_idx": [0, 1], "after.unsafe_refusal_rate": [0.5, None], "name": ["a", "b"]})
    for _ in range(2):
        tracker = MlflowTracker(TrackingConfig(), "run", folder, settings=SETTINGS)
        log_tables(tracker, {"batches": table})
    loaded = load_table(tracker.uri, tracker.experiment_id, "tables/batches.json", tracker.run_id)
    pd.testing.assert_frame_equal(loaded, table)


def test_system_metrics_are_logged_while_the_run_lasts(folder, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    with MlflowTracker(TrackingConfig(), "run", folder) as tracker, system_metrics(tracker):
        time.sleep(1.0)
    assert "system/cpu_utilization_percentage" in runs_by_name(tracker.uri)["run"].data.metrics

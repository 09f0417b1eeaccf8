"""An engine counts what transformers counts, from the first token to the last; one that records wrongly ends the capture."""

from __future__ import annotations

from functools import partial

import fake_vllm
import numpy as np
import pytest
import ray
from capture_helpers import message, write_batches

from moe_ray.config.capture import CaptureConfig
from moe_ray.config.model import ModelConfig
from moe_ray.errors import InputError
from moe_ray.orchestration.cluster.ray_session import wait_until_free
from moe_ray.orchestration.jobs.capture import capture
from moe_ray.orchestration.jobs.capture_actor import CaptureJob
from moe_ray.orchestration.jobs.engine_capture import EngineCaptureActor
from moe_ray.prompts.quarantine import QUARANTINE, TOO_LONG
from moe_ray.report.run_text import describe_capture
from moe_ray.routing.count_store import read_counts
from moe_ray.run_directory import CAPTURE, PARITY, RunDirectory

# Ray's workers cannot import test modules.
ray.cloudpickle.register_pickle_by_value(fake_vllm)

pytestmark = pytest.mark.slow

OPTIONS = {"max_new_tokens": 6, "ids": True, "template_tokens": False}


@pytest.fixture
def model(tiny_model_path):
    return ModelConfig(path=str(tiny_model_path))


@pytest.fixture
def engine(monkeypatch):
    """Has engine processes hold the fake."""

    def use(fault=""):
        monkeypatch.setattr(
            "moe_ray.orchestration.cluster.engine_process.EngineHolder", partial(fake_vllm.holder, fault=fault)
        )

    use()
    return use


def stored(run):
    """Counts and generated responses, each in the order of the examples."""
    counts = read_counts(run.sub(CAPTURE).sub("counts"))
    folder = run.sub(CAPTURE).sub("responses")
    responses = {
        (row.batch_idx, row.in_batch_idx): (row.response, list(row.ids), row.ended)
        for name in folder.parquet_names()
        for row in folder.read_frame(name).itertuples()
    }
    return counts, responses


@pytest.mark.needs_ray
@pytest.mark.filterwarnings("default")
class TestOnRay:
    def test_a_whole_capture_is_that_of_transformers(self, ray_cluster, model, engine, tmp_path):
        found = {}
        for name in ("transformers", "vllm"):
            write_batches(tmp_path / name / "prompts", 8, changes=[(7, message("very " * 3000))])
            run = RunDirectory.open(str(tmp_path / name))
            notes = capture(run, model, CaptureConfig(engine=name, min_parity=1.0, **OPTIONS))
            found[name] = notes, *stored(run), run.sub(CAPTURE).read_frame(QUARANTINE)
        (_, counts, responses, bad), (notes, their_counts, their_responses, their_bad) = found.values()
        for name in ("batch_idx", "in_batch_idx", "role", "num_tokens", "counts_NLE"):
            assert np.array_equal(getattr(their_counts, name), getattr(counts, name)), name
        assert {"prompt", "response"} == set(counts.role)
        assert len(responses) > 10
        assert their_responses == responses
        assert bad["reason"].tolist() == their_bad["reason"].tolist() == [TOO_LONG]
        engine_notes = notes["engine"]
        assert (engine_notes["name"], engine_notes["version"]) == ("vllm", "0.32.0+fake")
        assert engine_notes["share_equal"] == 1.0
        assert engine_notes["share_shifted"] < 0.9
        assert notes["padding_share"] == 0.0
        assert "counted by vllm 0.32.0+fake; of" in describe_capture(notes)

    @pytest.mark.exhaustive
    def test_rows_of_other_tokens_end_the_capture_before_anything_is_counted(
        self, ray_cluster, model, engine, tmp_path
    ):
        engine("shifted_rows")
        write_batches(tmp_path / "prompts", 4)
        run = RunDirectory.open(str(tmp_path))
        with pytest.raises(InputError, match=r"capture\.min_parity=0\.85: .* moved by one token .* neighbour"):
            capture(run, model, CaptureConfig(engine="vllm", generate=False))
        assert not run.counts_folder.parquet_names()
        assert not run.sub(CAPTURE).exists(PARITY)
        cpus = {"CPU": ray.cluster_resources()["CPU"]}
        wait_until_free(cpus, "the engines")  # which Ray ends some time after it is asked to
        assert ray.available_resources()["CPU"] == cpus["CPU"]

    @pytest.mark.exhaustive
    def test_what_was_compared_is_not_compared_again(self, ray_cluster, model, engine, tmp_path, monkeypatch):
        write_batches(tmp_path / "prompts", 4)
        run = RunDirectory.open(str(tmp_path))
        config = CaptureConfig(engine="vllm", generate=False)
        first = capture(run, model, config)
        (name, *_) = run.counts_folder.parquet_names()
        run.counts_folder.remove(name)
        run.sub(CAPTURE).remove(QUARANTINE)
        monkeypatch.setattr("moe_ray.orchestration.jobs.engine_capture.compare_routes", None)
        assert capture(run, model, config) == first | {"forwards": 1}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("zero_rows", "may never have been filled"),
        ("last_row_missing", r"got shape \(\d+, 3, 2\), expected"),
        ("physical_ids", "got expert 250, expected 0 to 23"),
        ("floats", "numbers of type float32"),
        ("none", "routed_experts: got NoneType"),
        ("lost_output", "got 3 outputs, expected 4"),
        ("other_text", "prompt_token_ids: got"),
    ],
)
def test_a_wrong_form_ends_the_capture_and_is_named(model, tmp_path, fault, said):
    write_batches(tmp_path / "prompts", 1)
    job = CaptureJob(
        model=model, config=CaptureConfig(engine="vllm", generate=False), run_url=str(tmp_path), session="one"
    )
    actor = EngineCaptureActor(fake_vllm.holder(model, 1, fault=fault, returns_routes=True), job)
    with actor.in_force(), pytest.raises(InputError, match=said):
        actor(np.arange(4))

"""One run that sweeps, goes on with the winner, fine-tunes in rounds and holds itself against baselines."""

import json

import pandas as pd
import pytest
from study_runs import modified, must_not_be_called, settings, study
from workflow import run_workflow


@pytest.fixture(scope="session")
def captured(ray_cluster, tiny_model_path, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("study") / "run"
    assert run_workflow("capture", settings(tiny_model_path, run_dir)) == 0
    return run_dir


@pytest.fixture(scope="session")
def finished(captured, tiny_model_path):
    """The whole study on the capture that is there; a second capture would be an error."""
    before = modified(captured / "capture")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_ray.orchestration.jobs.capture.capture", must_not_be_called)
        assert run_workflow("full", study(tiny_model_path, captured)) == 0
    assert modified(captured / "capture") == before
    return captured


@pytest.fixture(scope="session")
def summary(finished):
    return json.loads((finished / "summary.json").read_text())


@pytest.fixture(scope="session")
def trials(finished):
    return pd.read_parquet(finished / "sweep" / "trials.parquet")

"""What a sweep leaves behind: the winner's configuration runs by itself, and epochs are those that trials can take."""

from types import SimpleNamespace

import pandas as pd
import pytest

from moe_ray.config.io import parse_config, with_settings
from moe_ray.config.model import ModelConfig
from moe_ray.config.run import Config
from moe_ray.orchestration.jobs.sweep import BestKept, _scheduler, write_results
from moe_ray.orchestration.jobs.sweep_job import SweepJob, record_name
from moe_ray.run_directory import TRIALS, WINNER
from moe_ray.storage.folder import Folder
from moe_ray.studies.search_space import read_space

SPACE = {"identify.top_k": [6, 12], "finetune.epochs": {"randint": [2, 9]}}


@pytest.fixture
def config():
    return with_settings(Config(), {"sweep.run": True, "sweep.search": "random", "sweep.space": SPACE, "seed": 5})


def trial(top_k, epochs, state, objective=None):
    within = None if objective is None else True
    return {
        "identify.top_k": top_k, "finetune.epochs": epochs, "state": state, "objective": objective,
        "forgetting": None if objective is None else 0.125, "is_within_bound": within, "value": objective,
        "identify_seconds": 0.25, "train_seconds": 2.0, "trained_by": f"{top_k} {epochs}",
    }  # fmt: skip


def test_the_winner_is_a_configuration_that_runs_by_itself_and_the_notes_count_the_rest(config, tmp_path):
    ranked = pd.DataFrame(
        [
            trial(12, 3, "finished", 0.75),
            trial(6, 2, "finished", 0.5),
            trial(6, 8, "stopped", 0.25),
            trial(12, 5, "failed"),
        ]
    )
    folder = Folder.open(str(tmp_path))
    notes = write_results(folder, config, ranked)
    assert notes["winner"] == {"identify.top_k": 12, "finetune.epochs": 3}
    assert (notes["trials"], notes["stopped"], notes["failed"], notes["value"]) == (4, 1, 1, 0.75)
    assert (notes["identify_seconds_max"], notes["train_seconds"]) == (0.25, 8.0)
    assert notes["trainings"] == 2
    winner = parse_config(folder.read_bytes(WINNER).decode(), source="winner")
    assert winner == with_settings(config, {**notes["winner"], "sweep.run": False})
    assert folder.read_frame(TRIALS)["state"].tolist() == ["finished", "finished", "stopped", "failed"]


@pytest.mark.parametrize(
    ("space", "most"),
    [
        ({"identify.top_k": [6, 12]}, 4),
        ({"finetune.epochs": [1, 7]}, 7),
        ({"finetune.epochs": [1, 2]}, 4),
        ({"finetune.epochs": {"randint": [2, 9]}}, 8),
    ],
)
def test_a_trial_may_take_as_many_epochs_as_any_of_the_space(space, most):
    settings = {"finetune.epochs": 4, "sweep.space": space, "sweep.search": "random", "sweep.scheduler": "asha"}
    config = with_settings(Config(), settings)
    assert _scheduler(config, read_space(config))._max_t == most
    assert _scheduler(with_settings(config, {"sweep.scheduler": "none"}), read_space(config)) is None


def test_only_the_best_trials_keep_what_they_learned(tmp_path):
    job = SweepJob(model=ModelConfig(), config=Config(), run_url=str(tmp_path), inputs={})
    watch = BestKept(job)

    def ends(name, value, state="finished", trained_by=None):
        settings = {"identify.top_k": name}
        owner = trained_by or f"trial{name}"
        if trained_by is None:
            job.trials.sub(owner).write_json("training.json", {})
        job.trials.sub(f"trial{name}").write_json("record.json", {})
        job.records.write_json(record_name(settings), {"state": state, "value": value, "trained_by": owner})
        watch.on_trial_complete(0, [], SimpleNamespace(config=settings))

    def keeping():
        return [name for name in job.trials.names() if job.trials.exists(f"{name}/training.json")]

    ends(1, 0.5)
    ends(2, 0.25)
    assert keeping() == ["trial1"]
    ends(3, 0.5)  # a tie, which the rank decides
    ends(4, 0.5, trained_by="trial1")
    ends(5, 0.9, state="stopped")
    assert keeping() == ["trial1", "trial3"]
    ends(6, 0.75)
    ends(7, 0.5, trained_by="trial3")
    assert keeping() == ["trial6"]
    watch.on_trial_complete(0, [], SimpleNamespace(config={"identify.top_k": 99}))  # one that left no record
    assert keeping() == ["trial6"]
    assert len(job.trials.names()) == 7  # what they measured stays

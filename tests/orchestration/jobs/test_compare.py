"""An arm is a stage: what was finished with equal inputs is read, and only what is missing or changed runs."""

from dataclasses import replace

import pandas as pd
import pytest

from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.config.finetune import FinetuneConfig
from moe_ray.config.model import ModelConfig
from moe_ray.experts import Expert, masks_from_experts
from moe_ray.orchestration.jobs import compare
from moe_ray.orchestration.jobs.compare import CompareJob, run_arms
from moe_ray.storage.folder import Folder
from moe_ray.studies.baselines import OURS, Arm
from moe_ray.studies.comparison import BASE
from moe_ray.studies.measured import Measured

MASKS = masks_from_experts({3: [Expert(0, 1), Expert(1, 2)], 5: [Expert(0, 1)]}, layers=(0, 1), num_experts=4)
TRAIN = FinetuneConfig(patience=0)
ARMS = [
    Arm(name=OURS, kind=OURS, masks=MASKS, train=TRAIN),
    Arm(name="full", kind="full", masks=None, train=TRAIN),
]


@pytest.fixture
def ran(monkeypatch):
    """Names of the arms that ran, here without a model."""
    names = []

    def runs(job, arms, folder, depends):
        for arm in arms:
            names.append(arm.name)
            answers = pd.DataFrame({"id": ["a", "b"], "label": ["safe", "unsafe"], "refused": [False, True]})
            neutral = None if arm.kind == "full" else pd.DataFrame({"loss": [2.0], "num_tokens": [4]})
            notes = {"trainable_parameters": len(names), "train_seconds": 0.5, "losses": [1.0]}
            measured = Measured(answers=answers, neutral=neutral)
            compare._write_arm(arm, (measured, notes), folder.sub(arm.name), depends[arm.name])

    monkeypatch.setattr(compare, "_run_missing", runs)
    return names


@pytest.fixture
def run(tmp_path, ran):
    job = CompareJob(
        model=ModelConfig(), evaluate=EvaluateConfig(), seed=0, run_url=str(tmp_path), trained_batches=(3, 5),
        num_actors=1, gpus_per_actor=0.0,
    )  # fmt: skip

    def runs(arms=ARMS, test="abc", targets="abc"):
        ran.clear()
        folder = Folder.open(str(tmp_path / "compare"))
        return run_arms(job, arms, folder, measured={"test": test}, trained={"targets": targets})

    return runs


def test_the_base_model_is_the_first_arm_and_a_finished_arm_comes_back_as_it_was(run, ran):
    first = run()
    assert [arm.name for arm in first] == ran == [BASE, OURS, "full"]
    again = run()
    assert ran == []
    assert [arm.trainable_parameters for arm in again] == [arm.trainable_parameters for arm in first] == [1, 2, 3]
    assert [arm.experts_per_batch for arm in again] == [None, 1.5, None]
    assert [arm.measured.neutral is None for arm in again] == [False, False, True]
    for one, other in zip(first, again, strict=True):
        pd.testing.assert_frame_equal(one.measured.answers, other.measured.answers)


def test_another_baseline_runs_alone(run, ran):
    run()
    run([*ARMS, Arm(name="random_0", kind="random", masks=MASKS, train=TRAIN)])
    assert ran == ["random_0"]


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"learning_rate": 0.125}, ["full"]),
        ({"routing": "natural"}, ["full"]),
        ({"rows_per_forward": 3}, []),
        ({"monitor": False}, []),
    ],
)
def test_only_a_setting_that_changes_weights_trains_an_arm_again(run, ran, change, again):
    run()
    run([ARMS[0], replace(ARMS[1], train=replace(TRAIN, **change))])
    assert ran == again


def test_other_masks_train_their_arm_again_other_targets_all_and_other_questions_the_base_model_too(run, ran):
    run()
    other = masks_from_experts({3: [Expert(0, 0)], 5: [Expert(0, 1)]}, layers=(0, 1), num_experts=4)
    run([replace(ARMS[0], masks=other), ARMS[1]])
    assert ran == [OURS]
    run(targets="other")
    assert ran == [OURS, "full"]
    run(test="other")
    assert ran == [BASE, OURS, "full"]

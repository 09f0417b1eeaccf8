"""An arm under a seed is a stage: what was finished with equal inputs is read, and only what is missing or changed runs."""

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
from moe_ray.studies.baselines import BASE, OURS, Arm
from moe_ray.studies.measured import Measured
from moe_ray.studies.run_arm import ArmOutcome

MASKS = masks_from_experts({3: [Expert(0, 1), Expert(1, 2)], 5: [Expert(0, 1)]}, layers=(0, 1), num_experts=4)
TRAIN = FinetuneConfig(patience=0)
ARMS = [
    Arm(name=OURS, kind=OURS, masks=MASKS, train=TRAIN),
    Arm(name="full", kind="full", masks=None, train=TRAIN, learns="all"),
]


SHARES = (0.5, 1.0)


@pytest.fixture
def ran(monkeypatch):
    """Folders of the arms that ran, here without a model."""
    folders = []

    def runs(job, missing, folder, depends):
        for training in missing:
            folders.append(training.folder)
            answers = pd.DataFrame({"id": ["a", "b"], "label": ["safe", "unsafe"], "refused": [False, True]})
            neutral = None if training.arm.kind == "full" else pd.DataFrame({"loss": [2.0], "num_tokens": [4]})
            outcome = ArmOutcome(
                measured={
                    share: Measured(answers=answers.assign(target_loss=share + training.seed), neutral=neutral)
                    for share in job.shares
                },
                steps={share: int(4 * share) for share in job.shares},
                trainable_parameters=len(folders),
                rank=training.arm.rank,
                losses=(1.0,),
                train_seconds=0.5,
                evaluate_seconds=0.25,
            )
            compare._write_arm(training, outcome, folder.sub(training.folder), depends[training.folder])

    monkeypatch.setattr(compare, "_run_missing", runs)
    return folders


@pytest.fixture
def run(tmp_path, ran):
    job = CompareJob(
        model=ModelConfig(), evaluate=EvaluateConfig(), seed=0, num_seeds=1, shares=SHARES, run_url=str(tmp_path),
        union_LE=MASKS.union, trained_batches=(3, 5), num_actors=1, gpus_per_actor=0.0,
    )  # fmt: skip

    def runs(arms=ARMS, test="abc", targets="abc", **changes):
        ran.clear()
        folder = Folder.open(str(tmp_path / "compare"))
        asked = replace(job, **changes)
        return run_arms(asked, arms, folder, measured={"test": test}, trained={"targets": targets})

    return runs


def test_the_base_model_is_the_first_arm_and_a_finished_arm_comes_back_as_it_was(run, ran):
    first = run()
    assert [arm.name for arm in first] == [BASE, OURS, "full"]
    assert ran == [f"{BASE}/seed_0", f"{OURS}/seed_0", "full/seed_0"]
    again = run()
    assert ran == []
    assert [arm.trainable_parameters for arm in again] == [arm.trainable_parameters for arm in first] == [1, 2, 3]
    assert [arm.experts_per_batch for arm in again] == [None, 1.5, None]
    for one, other in zip(first, again, strict=True):
        assert one.steps == other.steps == {0.5: 2, 1.0: 4}
        for share in SHARES:
            assert (other.measured[0][share].neutral is None) == (other.name == "full")
            pd.testing.assert_frame_equal(one.measured[0][share].answers, other.measured[0][share].answers)
            assert set(other.measured[0][share].answers["target_loss"]) == {share}


@pytest.mark.slow
def test_another_seed_runs_alone_and_what_trains_nothing_has_none(run, ran):
    run()
    found = run(num_seeds=3)
    assert ran == [f"{name}/seed_{seed}" for name in (OURS, "full") for seed in (1, 2)]
    assert [len(arm.measured) for arm in found] == [1, 3, 3]
    assert [set(each[1.0].answers["target_loss"]) for each in found[1].measured] == [{1.0}, {2.0}, {3.0}]
    run(seed=1)  # which is the second of the three
    assert ran == [f"{BASE}/seed_1"]


@pytest.mark.slow
def test_other_shares_measure_all_arms_anew(run, ran):
    run()
    run(shares=(1.0,))
    assert len(ran) == 3


@pytest.mark.slow
def test_another_budget_leaves_what_was_done_under_the_first(run, ran):
    arm = Arm(name="lora_same", kind="lora_same", masks=MASKS, train=TRAIN, learns="low_rank", rank=4)
    run([ARMS[0], arm])
    run([ARMS[0], replace(arm, rank=0, is_matched=True)])
    assert ran == ["lora_same_matched/seed_0"]
    run([ARMS[0], arm])
    assert ran == []
    # The number of parameters is that of the union, whatever the arm's own masks are.
    run([ARMS[0], replace(arm, rank=0, is_matched=True)], union_LE=~MASKS.union)
    assert ran == ["lora_same_matched/seed_0"]


@pytest.mark.slow
def test_another_baseline_runs_alone(run, ran):
    run()
    run([*ARMS, Arm(name="random_0", kind="random", masks=MASKS, train=TRAIN)])
    assert ran == ["random_0/seed_0"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"learning_rate": 0.125}, ["full/seed_0"]),
        ({"routing": "masked"}, ["full/seed_0"]),
        ({"rows_per_forward": 3}, []),
        ({"monitor": False}, []),
    ],
)
def test_only_a_setting_that_changes_weights_trains_an_arm_again(run, ran, change, again):
    run()
    run([ARMS[0], replace(ARMS[1], train=replace(TRAIN, **change))])
    assert ran == again


@pytest.mark.slow
def test_other_masks_train_their_arm_again_other_targets_all_and_other_questions_the_base_model_too(run, ran):
    run()
    other = masks_from_experts({3: [Expert(0, 0)], 5: [Expert(0, 1)]}, layers=(0, 1), num_experts=4)
    run([replace(ARMS[0], masks=other), ARMS[1]])
    assert ran == [f"{OURS}/seed_0"]
    run(targets="other")
    assert ran == [f"{OURS}/seed_0", "full/seed_0"]
    run(test="other")
    assert ran == [f"{name}/seed_0" for name in (BASE, OURS, "full")]

"""Two workers: whole batches each, gradients averaged over the holders, the same weights at the end (invariants 13, 14)."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from families import batch_masks, build, state_of
from one_worker import BATCHES, CONFIG, LENGTHS, POLICIES, RUNS, SHARED, experts_of, train, train_runs
from paths import TESTS
from safetensors.torch import load_file
from training_runs import changes

from moe_ray.errors import InputError
from moe_ray.finetuning.gradients import accumulate_gradient, without_noise
from moe_ray.finetuning.schedule import plan_steps
from moe_ray.finetuning.trainable_experts import trainable_experts

# Two processes that each load torch.
pytestmark = pytest.mark.slow

# gloo sums two float32 numbers, as the oracle does; AdamW's first steps turn the last bit of a gradient near 0 into more.
WEIGHT_TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where both workers wrote their weights, after training at the same time."""
    where = tmp_path_factory.mktemp("workers")
    other = subprocess.Popen([sys.executable, str(TESTS / "one_worker.py"), str(where)])
    try:
        train_runs(str(where), 0)
        assert other.wait(timeout=60) == 0
    finally:
        other.kill()
    return where


def written(folder, run, rank):
    tensors = load_file(folder / f"{run}-{rank}.safetensors")
    return {name: tensors.pop(name) for name in ("losses", "batches")}, tensors


def train_as_the_definition_says(run):
    """One process: per step the gradient of each batch alone, averaged per expert over the batches that hold it."""
    model = build("olmoe")
    masks = batch_masks(model, experts_of(run))
    with trainable_experts(model, masks.union) as trainable:
        optimizer = torch.optim.AdamW(
            trainable.all_parameters(), lr=CONFIG.learning_rate, weight_decay=CONFIG.weight_decay
        )
        for batch_ids in plan_steps(masks.trained_batches, epochs=CONFIG.epochs, batches_per_step=2, seed=0):
            held: dict = {}
            for batch in (batch for batch in batch_ids if batch >= 0):
                with without_noise(model):
                    accumulate_gradient(model, trainable, BATCHES[batch], masks[batch], config=CONFIG, pad_id=0)
                for expert in trainable.experts_of(masks[batch]):
                    for parameter in trainable.parameters[expert].values():
                        held.setdefault(parameter, []).append(parameter.grad)
                        parameter.grad = None
            for parameter, gradients in held.items():
                parameter.grad = sum(gradients) / len(gradients)
            torch.nn.utils.clip_grad_norm_(list(held), CONFIG.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            trainable.write_back(masks.union)
    return model


@pytest.mark.parametrize("run", RUNS)
def test_all_workers_end_with_the_same_weights(folder, run):
    first, second = written(folder, run, 0)[1], written(folder, run, 1)[1]
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("run", RUNS)
def test_two_workers_average_an_experts_gradient_over_the_batches_that_hold_it(folder, run):
    expected = train_as_the_definition_says(run).state_dict()
    for name, tensor in written(folder, run, 0)[1].items():
        torch.testing.assert_close(tensor, expected[name], atol=WEIGHT_TOLERANCE, rtol=0)


@pytest.mark.parametrize("run", RUNS)
def test_two_workers_move_the_union_only(folder, run):
    model = build("olmoe")
    before = state_of(model)
    model.load_state_dict(written(folder, run, 0)[1])
    assert changes(model, before) == (set(), {pair for pairs in experts_of(run).values() for pair in pairs})


@pytest.mark.parametrize("run", RUNS)
def test_how_many_workers_share_a_steps_batches_changes_no_weight(folder, run):
    alone = train(run, 0, 1, replace(CONFIG, batches_per_step=2))[0].state_dict()
    for name, tensor in written(folder, run, 0)[1].items():
        torch.testing.assert_close(tensor, alone[name], atol=WEIGHT_TOLERANCE, rtol=0)


@pytest.mark.parametrize("routing", POLICIES)
def test_under_every_policy_workers_change_no_weight(folder, routing):
    alone = train("even", 0, 1, replace(POLICIES[routing], batches_per_step=2))[0].state_dict()
    for rank in (0, 1):
        for name, tensor in load_file(folder / f"{routing}-{rank}.safetensors").items():
            torch.testing.assert_close(tensor, alone[name], atol=WEIGHT_TOLERANCE, rtol=0)


def test_workers_share_a_step_out_by_length_and_end_with_the_weights_of_one(folder):
    alone = train("even", 0, 1, SHARED, lengths=LENGTHS)[0].state_dict()
    for rank, own in enumerate([[7], [3, 5, 9]]):
        tensors = load_file(folder / f"shared-{rank}.safetensors")
        # Asked for before each epoch: what the worker trains in it, and nothing else.
        assert tensors.pop("asked").tolist() == [own] * SHARED.epochs
        for name, tensor in tensors.items():
            # Three gradients are summed on one worker before the other's is added: another order than one worker's, and
            # AdamW's first steps turn the last bit of a gradient near 0 into more.
            torch.testing.assert_close(tensor, alone[name], atol=10 * WEIGHT_TOLERANCE, rtol=0)


def test_every_worker_reports_the_batches_of_all(folder):
    alone = train("uneven", 0, 1, replace(CONFIG, batches_per_step=2))[1]
    for rank in (0, 1):
        told = written(folder, "uneven", rank)[0]
        planned = plan_steps(RUNS["uneven"], epochs=CONFIG.epochs, batches_per_step=2, seed=0)
        assert told["batches"].tolist() == [list(step) for step in planned]
        assert told["losses"].tolist() == pytest.approx([report.loss for report in alone], abs=1e-5)


def test_a_worker_without_a_batch_left_hangs_nobody(folder):
    assert (written(folder, "uneven", 1)[0]["batches"] == -1).any(dim=1).tolist() == [False, True, False, True]


def test_more_workers_than_batches_in_a_step_are_refused():
    with pytest.raises(InputError, match=r"finetune\.batches_per_step: got 1 for 2 workers"):
        train("even", 0, 2, replace(CONFIG, batches_per_step=1))


def test_rank_0_validates_and_all_workers_stop_at_the_same_step(folder):
    steps = [load_file(folder / f"stopping-{rank}.safetensors")["steps"].tolist() for rank in (0, 1)]
    assert steps == [[0, 1, 2, 3], [0, 1, 2, 3]]


def test_one_workers_steps_are_not_two_workers_steps(folder):
    # Guards the comparison above: if averaging did nothing, a lone worker's weights would be the same.
    alone = train("even", 0, 1)[0].state_dict()
    both = written(folder, "even", 0)[1]
    assert any((tensor - both[name]).abs().max() > 1000 * WEIGHT_TOLERANCE for name, tensor in alone.items())

"""A trial trains what a run with its settings would, and puts the base model back."""

from dataclasses import replace

import pytest
import torch
from families import batch_masks, build, state_of
from text_batches import BATCHES, EXPERTS
from word_tokenizer import make_tokenizer

from moe_ray.config.finetune import FinetuneConfig
from moe_ray.config.identify import IdentifyConfig
from moe_ray.experts import Expert
from moe_ray.identification.identify import identify
from moe_ray.identification.selection import select
from moe_ray.studies.trial import identify_masks, in_one_process, run_full_trial, run_trial
from moe_ray.testing.simulated_counts import Population, simulate

CONFIG = FinetuneConfig(epochs=2, learning_rate=1e-2, schedule="constant")


@pytest.mark.parametrize("settings", [{}, {"alpha": 0.2}, {"stability": 0.6}, {"top_k": 5}])
def test_masks_are_those_of_a_run_that_also_says_how_sure_it_is(settings):
    counts = simulate(Population(), num_batches=2, planted=(Expert(0, 2), Expert(2, 9)), shift=0.6)
    selection = IdentifyConfig(**settings)
    expected = select(identify(counts, selection, seed=3), selection, seed=3)
    assert identify_masks(counts, selection, seed=3).digest() == expected.digest()


@pytest.mark.parametrize(("asked", "workers", "expected"), [(0, 3, 3), (5, 3, 5), (0, 1, 1)])
def test_one_process_takes_as_many_batches_a_step_as_the_workers_would(asked, workers, expected):
    got = in_one_process(FinetuneConfig(batches_per_step=asked, num_workers=workers))
    assert (got.batches_per_step, got.num_workers) == (expected, 1)


def masked(model, measure):
    masks = batch_masks(model, EXPERTS)
    return run_trial(model, make_tokenizer(), BATCHES, masks, config=CONFIG, seed=0, measure=measure)


def full(model, measure):
    return run_full_trial(model, make_tokenizer(), BATCHES, only=[4, 6], config=CONFIG, seed=0, measure=measure)


@pytest.mark.parametrize("trial", [masked, full])
def test_the_tuned_model_is_measured_and_the_base_is_back(trial):
    model = build("olmoe")
    before, seen = state_of(model), []
    outcome = trial(model, lambda: seen.append(state_of(model)) or "measured")
    assert outcome.measured == "measured"
    assert len(outcome.losses) == 4
    assert any(not torch.equal(tensor, before[name]) for name, tensor in seen[0].items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(model).items())


@pytest.mark.parametrize("trial", [masked, full])
def test_the_base_is_back_after_a_measurement_that_fails(trial):
    def fails():
        raise RuntimeError("the judge is away")

    model = build("olmoe")
    before = state_of(model)
    with pytest.raises(RuntimeError, match="the judge is away"):
        trial(model, fails)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(model).items())


def test_only_the_named_batches_train_all_parameters():
    losses = [
        run_full_trial(
            build("olmoe"), make_tokenizer(), BATCHES, only=only, config=replace(CONFIG, epochs=1), seed=0, measure=str
        ).losses
        for only in ([4], [4, 6])
    ]
    assert [len(steps) for steps in losses] == [1, 2]

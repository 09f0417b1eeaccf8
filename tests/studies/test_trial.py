"""A trial trains what a run with its settings would, and puts the base model back."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from answered_counts import answered
from families import batch_masks, build, state_of
from prompt_tokens import by_prompt_tokens
from text_batches import BATCHES, EXPERTS
from word_tokenizer import make_tokenizer

from moe_ray.config.finetune import FinetuneConfig
from moe_ray.errors import InputError, NothingSelected
from moe_ray.experts import Expert
from moe_ray.finetuning.parameter_groups import parameters_of
from moe_ray.identification.identify import identify
from moe_ray.identification.selection import select
from moe_ray.routing.count_tables import counts_to_table
from moe_ray.routing.counts import concat_counts
from moe_ray.storage.folder import Folder
from moe_ray.studies import trial as trial_module
from moe_ray.studies.trial import identify_masks, identify_stored_masks, in_one_process, run_trial, run_trial_of
from moe_ray.testing.simulated_counts import Population, simulate

CONFIG = FinetuneConfig(epochs=2, learning_rate=1e-2, schedule="constant")


@pytest.mark.parametrize("settings", [{}, {"alpha": 0.2}, {"stability": 0.6}, {"top_k": 5}])
def test_masks_are_those_of_a_run_that_also_says_how_sure_it_is(settings):
    counts = simulate(Population(), num_batches=2, planted=(Expert(0, 2), Expert(2, 9)), shift=0.6)
    selection = by_prompt_tokens(**settings)
    expected = select(identify(counts, selection, seed=3), selection, seed=3)
    assert identify_masks(counts, selection, seed=3).digest() == expected.digest()


COUNTS = simulate(Population(), num_batches=7, planted=(Expert(0, 2), Expert(2, 9)), shift=0.6)


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """`COUNTS` in parts that share batches, of which two batches are identified at a time; and how many were, each time."""
    folder = Folder.open(str(tmp_path))
    for number, rows in enumerate(np.array_split(np.random.default_rng(0).permutation(len(COUNTS)), 4)):
        folder.write_table(f"part-{number}.parquet", counts_to_table(COUNTS.take(np.sort(rows))), row_group_size=5)
    monkeypatch.setattr(trial_module, "_EXPERTS_AT_ONCE", 2 * 64)
    held = []
    read = trial_module.read_batches
    monkeypatch.setattr(
        trial_module,
        "read_batches",
        lambda parts, names, batches: held.append(len(batches)) or read(parts, names, batches),
    )
    return folder, held


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{}, {"alpha": 0.2}, {"stability": 0.6}, {"rule": "random"}, {"rule": "esft_token"}]
)
def test_masks_of_stored_counts_are_those_of_all_counts_and_few_are_held_at_a_time(stored, settings):
    parts, held = stored
    selection = by_prompt_tokens(**settings)
    expected = identify_masks(COUNTS, selection, seed=3)
    got = identify_stored_masks(parts, selection, seed=3)
    assert got.digest() == expected.digest()
    assert dict(got.selected) == dict(expected.selected)
    assert held == [2, 2, 2, 1]


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["attribution", "gate", "gate_refuse", "comply_refuse", "reap", "top_routed"])
def test_rules_that_rank_by_scores_need_no_more_than_what_is_stored(tmp_path, rule):
    counts = concat_counts([answered(seed, batch_idx=seed, planted=2.0) for seed in range(4)])
    folder, names = Folder.open(str(tmp_path)), counts.in_batch_idx % 3
    for number in range(3):
        folder.write_table(f"part-{number}.parquet", counts_to_table(counts.take(names == number)))
    selection = by_prompt_tokens(rule=rule, threshold=0.0, min_share=0.5)
    expected = identify_masks(counts, selection, seed=0)
    assert identify_stored_masks(folder, selection, seed=0).digest() == expected.digest()
    if rule in ("attribution", "gate", "gate_refuse"):
        assert all(set(expected.selected[batch]) == {Expert(1, 2)} for batch in range(4))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"threshold": 0.99}, {"alpha": 1e-9, "permutations": 50}])
def test_where_nothing_is_selected_the_reason_is_that_of_all_counts(stored, settings):
    selection = by_prompt_tokens(**settings)
    with pytest.raises(NothingSelected) as of_all:
        identify_masks(COUNTS, selection, seed=3)
    with pytest.raises(NothingSelected) as streamed:
        identify_stored_masks(stored[0], selection, seed=3)
    assert str(streamed.value) == str(of_all.value)


def test_batches_of_one_label_get_no_mask(tmp_path):
    folder = Folder.open(str(tmp_path))
    folder.write_table(
        "part-0.parquet", counts_to_table(COUNTS.take((COUNTS.batch_idx != 2) | (COUNTS.label == "safe")))
    )
    assert identify_stored_masks(folder, by_prompt_tokens(), seed=0).batch_idx == (0, 1, 3, 4, 5, 6)
    folder.write_table("part-0.parquet", counts_to_table(COUNTS.take(COUNTS.label == "safe")))
    with pytest.raises(InputError, match="none of 7 batches has prompt tokens of both labels"):
        identify_stored_masks(folder, by_prompt_tokens(), seed=0)


@pytest.mark.parametrize(("asked", "workers", "expected"), [(0, 3, 3), (5, 3, 5), (0, 1, 1)])
def test_one_process_takes_as_many_batches_a_step_as_the_workers_would(asked, workers, expected):
    got = in_one_process(FinetuneConfig(batches_per_step=asked, num_workers=workers))
    assert (got.batches_per_step, got.num_workers) == (expected, 1)


def masked(model, measure):
    masks = batch_masks(model, EXPERTS)
    return run_trial(model, make_tokenizer(), BATCHES, masks, config=CONFIG, seed=0, measure=measure)


def full(model, measure, *, config=CONFIG, only=(4, 6)):
    chosen = parameters_of(model, "all")
    return run_trial_of(
        model, make_tokenizer(), BATCHES, chosen=chosen, only=only, config=config, seed=0, measure=measure
    )


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
    config = replace(CONFIG, epochs=1)
    losses = [full(build("olmoe"), str, config=config, only=only).losses for only in ([4], [4, 6])]
    assert [len(steps) for steps in losses] == [1, 2]

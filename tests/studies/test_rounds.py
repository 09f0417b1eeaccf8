"""Rounds: what is asked of the next one, when they stop, and learned experts that compose against the original base."""

import copy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from families import batch_masks, build, rows

from moe_ray.config.finetune import FinetuneConfig
from moe_ray.config.rounds import RoundsConfig
from moe_ray.errors import FrozenChanged, InputError
from moe_ray.experts import Expert, masks_from_experts
from moe_ray.finetuning.adapter import adapter_applied, expert_weights, load_adapter, save_adapter
from moe_ray.finetuning.adapter_tensors import hash_weights
from moe_ray.finetuning.fine_tune import FineTuned, continue_fine_tuning
from moe_ray.finetuning.frozen import count_changed, hash_frozen
from moe_ray.finetuning.trainable_experts import trainable_experts
from moe_ray.finetuning.trainer import MaskedTrainer
from moe_ray.studies.rounds import (
    RoundReport,
    batch_rates,
    best_round,
    exchanged_masks,
    raised_weights,
    report_round,
    stop_reason,
)

CATEGORIES = {0: "fraud", 1: "fraud", 4: "theft", 6: "mixed"}


def answers(fraud, theft, safe):
    unsafe = [("unsafe", "fraud", hit) for hit in fraud] + [("unsafe", "theft", hit) for hit in theft]
    frame = unsafe + [("safe", "fraud", hit) for hit in safe]
    return pd.DataFrame(frame, columns=["label", "category", "refused"]).astype({"refused": bool})


def report(number, lagging, cost):
    return RoundReport(
        round=number, lagging=lagging, shortfall=cost, unsafe_refusal_rate=0.5, safe_refusal_rate=0.0, cost=cost
    )


def test_a_batch_is_held_to_the_unsafe_examples_of_its_category_or_to_all():
    rates = batch_rates(answers([1, 1, 0, 1], [0, 0], [1, 1]), CATEGORIES)
    assert {batch: (rate.value, rate.n) for batch, rate in rates.items()} == {
        0: (0.75, 4),
        1: (0.75, 4),
        4: (0.0, 2),
        6: (0.5, 6),
    }


def test_a_round_reports_who_lags_by_how_much_and_what_over_refusal_costs():
    got = report_round(2, answers([1, 1, 0, 1], [0, 0], [1, 0, 0, 0]), CATEGORIES, target=0.75)
    assert got.lagging == (4, 6)
    assert got.shortfall == pytest.approx((0.75 + 0.25) / 4)
    assert got.cost == pytest.approx(got.shortfall + 0.25)


@pytest.mark.parametrize(
    ("reports", "message"),
    [
        ([report(1, (), 0.0)], "every batch reached its target"),
        ([report(1, (3,), 0.4)], ""),
        ([report(1, (3,), 0.4), report(2, (3,), 0.2)], ""),
        ([report(1, (3,), 0.4), report(2, (3,), 0.399)], "nothing improved in round 2"),
        ([report(1, (3,), 0.4), report(2, (3,), 0.6)], "nothing improved in round 2"),
        ([report(1, (3,), 0.4), report(2, (3,), 0.2), report(3, (3,), 0.1)], "rounds.max_rounds=3 are done"),
        ([report(1, (3,), 0.4), report(2, (3,), 0.2), report(3, (), 0.0)], "every batch reached its target"),
    ],
)
def test_rounds_stop_when_targets_are_met_or_nothing_improves(reports, message):
    reason = stop_reason(reports, RoundsConfig(max_rounds=3))
    assert message in reason
    assert bool(reason) == bool(message)


def test_the_round_with_the_least_cost_is_kept_and_the_earlier_of_equals():
    assert best_round([report(1, (3,), 0.4), report(2, (3,), 0.1), report(3, (3,), 0.1)]).round == 2


def test_lagging_batches_count_more_every_round_they_lag():
    once = raised_weights({}, [3, 5], 2.0)
    assert raised_weights(once, [5], 2.0) == {3: 2.0, 5: 4.0}


def test_only_batches_that_were_identified_anew_change_their_masks():
    masks = masks_from_experts({3: [Expert(0, 1)], 5: [Expert(1, 2)], 8: []}, layers=(0, 1), num_experts=4)
    found = masks_from_experts({3: [Expert(1, 3), Expert(0, 0)], 5: []}, layers=(0, 1), num_experts=4)
    after = exchanged_masks(masks, found)
    assert after.selected == {3: (Expert(1, 3), Expert(0, 0)), 5: (Expert(1, 2),), 8: ()}
    assert after.batch_idx == masks.batch_idx


FROZEN = FinetuneConfig()
FIRST = {7: [(0, 1), (0, 5), (1, 3)], 3: [(0, 2), (1, 0)]}
SECOND = {7: [(0, 1), (1, 6)], 3: [(0, 2), (1, 7)]}
ROWS = {7: rows((5, 4), (3, 2), seed=1), 3: rows((4, 3), (6, 5), seed=2)}


def train(model, masks, folder):
    """Trains and saves as `fine_tune` does, from token ids."""
    before = hash_weights(expert_weights(model, list(masks.union_experts)))
    frozen = hash_frozen(model, masks.union)
    with trainable_experts(model, masks.union) as experts:
        config = FinetuneConfig(epochs=2, learning_rate=1e-2, weight_decay=0.1)
        trainer = MaskedTrainer(model, experts, ROWS, masks, config, pad_id=0, seed=0)
        reports = trainer.run()
        save_adapter(folder, experts, base="base", base_hash=before, mask_hash=masks.digest())
    return FineTuned(
        reports=tuple(reports),
        trainable_parameters=0,
        total_parameters=0,
        frozen_parameters_changed=count_changed(frozen, hash_frozen(model, masks.union)),
    )


@pytest.fixture(scope="module")
def two_rounds(tmp_path_factory):
    root = tmp_path_factory.mktemp("rounds")
    trained = build("olmoe")
    first, second = batch_masks(trained, FIRST), batch_masks(trained, SECOND)
    train(trained, first, root / "first")
    # A second round starts from the base and the first round's adapter, as a fresh worker does.
    model = build("olmoe")
    outcome = continue_fine_tuning(
        model,
        root / "first",
        root / "both",
        second,
        lambda folder: train(model, second, folder),
        config=FinetuneConfig(),
        saves=True,
    )
    return root, trained, model, (first, second), outcome


@pytest.mark.slow
def test_the_composed_adapter_gives_the_model_of_the_last_round_from_the_original_base(two_rounds):
    root, _, model, _, _ = two_rounds
    base = build("olmoe")
    with adapter_applied(base, root / "both"):
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in base.state_dict().items())
    assert all(torch.equal(tensor, build("olmoe").state_dict()[name]) for name, tensor in base.state_dict().items())


def test_the_composed_adapter_holds_the_union_of_all_rounds(two_rounds):
    root, _, _, (first, second), _ = two_rounds
    about, tensors = load_adapter(root / "both")
    assert set(tensors) == set(first.union_experts) | set(second.union_experts)
    assert about["experts"] == sorted(about["experts"])
    assert (about["layers"], about["base"]) == ([0, 1], "base")


def test_an_expert_that_only_the_first_round_trained_is_as_that_round_left_it(two_rounds):
    root, after_first, _, (first, second), _ = two_rounds
    _, tensors = load_adapter(root / "both")
    only_first = set(first.union_experts) - set(second.union_experts)
    assert only_first
    for expert, weights in expert_weights(after_first, list(only_first)).items():
        assert all(torch.equal(tensor, weights[name]) for name, tensor in tensors[expert].items())


def test_the_second_round_started_where_the_first_ended(two_rounds, tmp_path):
    _, after_first, model, (_, second), _ = two_rounds
    expected = copy.deepcopy(after_first)
    train(expected, second, tmp_path)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in expected.state_dict().items())


def test_frozen_and_trainable_are_counted_against_the_original_base(two_rounds):
    _, _, model, (first, second), outcome = two_rounds
    assert outcome.frozen_parameters_changed == 0
    union = first.union | second.union
    weights = expert_weights(build("olmoe"), [Expert(row, int(e)) for row, e in np.argwhere(union)])
    assert outcome.trainable_parameters == sum(t.numel() for tensors in weights.values() for t in tensors.values())
    assert count_changed(hash_frozen(build("olmoe"), union), hash_frozen(model, union)) == 0


def test_a_parameter_that_a_later_round_moves_outside_the_union_ends_it_and_no_adapter_is_written(two_rounds, tmp_path):
    root, _, _, (_, second), _ = two_rounds
    model = build("olmoe")

    def meddle(folder):
        outcome = train(model, second, folder)
        with torch.no_grad():
            next(model.parameters())[0, 0] += 1
        return outcome

    size = next(model.parameters()).numel()
    with pytest.raises(FrozenChanged, match=f"{size:,} numbers"):
        continue_fine_tuning(model, root / "first", tmp_path / "out", second, meddle, config=FROZEN, saves=True)
    assert not Path(tmp_path, "out").exists()


def test_a_worker_that_does_not_save_writes_nothing(two_rounds, tmp_path):
    root, _, _, (_, second), _ = two_rounds
    model = build("olmoe")
    continue_fine_tuning(
        model,
        root / "first",
        tmp_path / "out",
        second,
        lambda folder: train(model, second, folder),
        config=FinetuneConfig(),
        saves=False,
    )
    assert not Path(tmp_path, "out").exists()


def test_an_adapter_of_another_base_is_not_continued(two_rounds, tmp_path):
    root, _, _, (_, second), _ = two_rounds
    model = build("olmoe")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    with pytest.raises(InputError, match="not those it was trained from"):
        continue_fine_tuning(
            model,
            root / "first",
            tmp_path,
            second,
            lambda folder: train(model, second, folder),
            config=FinetuneConfig(),
            saves=True,
        )

"""Fine-tuning from text: what the configuration asks for is what the trainer does."""

from __future__ import annotations

import re

import pytest
import torch
from families import batch_masks, build, routing_spied, state_of
from text_batches import BATCHES, EXPERTS
from training_runs import assert_only_these_moved
from word_tokenizer import make_tokenizer

from moe_ray.config.finetune import FinetuneConfig
from moe_ray.errors import FrozenChanged, InputError, NothingSelected
from moe_ray.experts import masks_from_experts
from moe_ray.finetuning.adapter import apply_adapter
from moe_ray.finetuning.fine_tune import configured_weights, fine_tune
from moe_ray.models.moe_layers import find_moe_layers

CATEGORIES = {batch.batch_idx: batch.category for batch in BATCHES}


def tune(model, *, after_step=None, caller_weights=None, adapter=None, **settings):
    config = FinetuneConfig(
        **{"routing": "masked", "epochs": 2, "learning_rate": 1e-2, "schedule": "constant", **settings}
    )
    return fine_tune(
        model,
        make_tokenizer(),
        BATCHES,
        batch_masks(model, EXPERTS),
        config=config,
        adapter=adapter,
        after_step=after_step,
        batch_weights=caller_weights,
    )


def test_nothing_but_the_union_changes():
    model = build("olmoe")
    before = state_of(model)
    tuned = tune(model, weight_decay=0.1)
    assert tuned.frozen_parameters_changed == 0
    assert re.fullmatch(r"FineTuned\(4 steps, last loss \d+\.\d{4}, [\d,]+ of [\d,]+ parameters\)", repr(tuned))
    assert_only_these_moved(model, before, {pair for pairs in EXPERTS.values() for pair in pairs})


def test_a_frozen_parameter_that_changes_ends_the_training_and_no_adapter_is_written(tmp_path):
    model = build("olmoe")

    def meddle(trainer, report):
        with torch.no_grad():
            model.model.embed_tokens.weight[0, 0] += 1

    size = model.model.embed_tokens.weight.numel()
    with pytest.raises(FrozenChanged, match=rf"{size:,} numbers .*embed_tokens\.weight"):
        tune(model, after_step=meddle, adapter=tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_frozen_expert_beside_the_unions_is_watched_as_well(tmp_path):
    model = build("olmoe")
    frozen = next(expert for expert in range(8) if all((0, expert) not in pairs for pairs in EXPERTS.values()))

    def meddle(trainer, report):
        with torch.no_grad():
            model.model.layers[0].mlp.experts.down_proj[frozen] += 1

    with pytest.raises(FrozenChanged, match=rf"down_proj \[{frozen}\]"):
        tune(model, after_step=meddle)


def test_routers_that_learn_are_trainable_and_in_the_adapter_and_all_else_is_frozen(tmp_path):
    model, base = build("olmoe"), build("olmoe")
    tuned, frozen = tune(model, router="alternating", adapter=tmp_path), tune(build("olmoe"))
    routers = [layer.router.weight for layer in find_moe_layers(model)]
    assert tuned.frozen_parameters_changed == 0
    assert tuned.trainable_parameters == frozen.trainable_parameters + sum(weight.numel() for weight in routers)
    apply_adapter(base, tmp_path)
    assert all(torch.equal(tensor, state_of(model)[name]) for name, tensor in state_of(base).items())
    assert not any(
        torch.equal(weight, layer.router.weight)
        for weight, layer in zip(routers, find_moe_layers(build("olmoe")), strict=True)
    )


def test_a_router_that_changes_though_it_is_frozen_ends_the_training():
    model = build("olmoe")

    def meddle(trainer, report):
        with torch.no_grad():
            find_moe_layers(model)[1].router.weight[0, 0] += 1

    with pytest.raises(FrozenChanged, match=r"first model\.layers\.1\.mlp\.gate\.weight"):
        tune(model, after_step=meddle)


def test_a_batch_learns_from_unsafe_examples_alone_where_it_is_told_to():
    tuned = tune(build("olmoe"), learn_from="unsafe")
    tokens = {batch.batch_idx: batch.num_tokens for report in tuned.reports for batch in report.batches}
    every = {b.batch_idx: b.num_tokens for report in tune(build("olmoe")).reports for b in report.batches}
    assert all(0 < tokens[batch_idx] < every[batch_idx] for batch_idx in every)


def test_masks_without_any_expert_leave_nothing_to_train():
    model = build("olmoe")
    empty = masks_from_experts({batch.batch_idx: () for batch in BATCHES}, layers=(0, 1), num_experts=8)
    with pytest.raises(NothingSelected, match="nothing can be trained"):
        fine_tune(model, make_tokenizer(), BATCHES, empty)


@pytest.mark.parametrize("entry", ["theft=0", "6=0.0"])
def test_a_weight_from_the_configuration_reaches_the_batch(entry):
    model = build("olmoe")
    before = state_of(model)
    tune(model, batch_weights=(entry,))
    assert_only_these_moved(model, before, EXPERTS[4])


def test_a_weight_of_the_caller_multiplies_the_configured_one():
    model = build("olmoe")
    before = state_of(model)
    tune(model, caller_weights={6: 0.0}, batch_weights=("theft=3",))
    assert_only_these_moved(model, before, EXPERTS[4])


def test_the_batchs_own_index_wins_over_its_category():
    assert configured_weights(["theft=2", "6=5", "fraud=0.5"], CATEGORIES) == {4: 0.5, 6: 5.0}


def test_a_weight_for_no_batch_is_refused():
    with pytest.raises(
        InputError, match=r"got 'arson', expected a batch_idx or one of the categories \['fraud', 'theft'\]"
    ):
        configured_weights(["arson=2"], CATEGORIES)


@pytest.mark.parametrize("entry", ["fraud", "=2", "fraud=-1", "fraud=much", "3=inf"])
def test_what_is_no_weight_is_refused(entry):
    with pytest.raises(InputError, match=r"finetune\.batch_weights"):
        FinetuneConfig(batch_weights=(entry,))


@pytest.mark.parametrize(("setting", "dtype"), [("float32", torch.float32), ("model", torch.bfloat16)])
def test_trained_copies_have_the_type_that_was_asked_for(setting, dtype):
    seen = set()

    def after_step(trainer, report):
        seen.update(parameter.dtype for parameter in trainer.trainable.all_parameters())
        seen.update(state["exp_avg"].dtype for state in trainer.optimizer.state.values())

    model = build("olmoe", dtype=torch.bfloat16)
    assert tune(model, dtype=setting, after_step=after_step).frozen_parameters_changed == 0
    assert seen == {dtype}


def test_the_monitor_is_on_unless_it_is_switched_off():
    monitors = []

    def after_step(trainer, report):
        monitors.append(trainer.monitor is not None)

    tune(build("olmoe"), epochs=1, after_step=after_step)
    tune(build("olmoe"), epochs=1, after_step=after_step, monitor=False)
    assert monitors == [True, True, False, False]


def test_activation_checkpointing_runs_layers_again_and_changes_no_weight():
    plain, checkpointed = build("olmoe"), build("olmoe")
    with routing_spied(plain) as once:
        tune(plain)
    with routing_spied(checkpointed) as twice:
        tune(checkpointed, activation_checkpointing=True)
    # Once more in each of two layers, for each batch of both epochs.
    assert len(twice) - len(once) == 2 * len(BATCHES) * 2
    assert not checkpointed.is_activation_checkpointing
    expected = state_of(plain)
    for name, tensor in state_of(checkpointed).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0)

"""Fine-tuning of given parameters, the baseline: they move, by the optimiser's own rule, and go back."""

import copy
from dataclasses import replace

import pytest
import torch
from families import build, rows

from moe_ray.config.finetune import FinetuneConfig
from moe_ray.errors import FrozenChanged
from moe_ray.finetuning.full_fine_tune import model_restored, tune_parameters
from moe_ray.finetuning.parameter_groups import parameters_of
from moe_ray.finetuning.schedule import plan_steps
from moe_ray.models.loss import answer_loss

pytestmark = pytest.mark.slow

BATCHES = {7: rows((5, 4), (3, 2), seed=1), 3: rows((4, 3), (6, 5), seed=2), 9: rows((2, 6), (5, 1), seed=3)}
CONFIG = FinetuneConfig(epochs=2, learning_rate=1e-2, schedule="constant", weight_decay=0.1)
TOLERANCE = 1e-6
"""Summing micro-batches in another order; weights are of order 1."""


def tuned(config=CONFIG, model=None, *, group="all", after_step=None):
    model = model or build("olmoe")
    chosen = parameters_of(model, group)
    outcome = tune_parameters(model, BATCHES, chosen=chosen, config=config, pad_id=0, seed=0, after_step=after_step)
    return model, outcome


def test_it_is_adamw_on_all_parameters_over_the_same_batches_in_the_same_order():
    expected = build("olmoe")
    # Of the same kernel: the plain one differs in last digits, which AdamW makes large where a gradient is nearly 0.
    optimizer = torch.optim.AdamW(expected.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    losses = []
    for (batch_idx,) in plan_steps(sorted(BATCHES), epochs=2, batches_per_step=1, seed=0):
        num_tokens = sum(len(row.answer_ids) for row in BATCHES[batch_idx])
        loss = answer_loss(expected, BATCHES[batch_idx], pad_id=0).sum() / num_tokens
        loss.backward()
        torch.nn.utils.clip_grad_norm_(expected.parameters(), CONFIG.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model, outcome = tuned()
    assert outcome.losses == pytest.approx(losses, abs=TOLERANCE)
    for (name, got), parameter in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got, parameter, atol=TOLERANCE, rtol=0, msg=name)
    assert outcome.trainable_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_micro_batches_change_memory_not_the_result():
    _, whole = tuned()
    _, cut = tuned(replace(CONFIG, rows_per_forward=1))
    assert len(cut.losses) == 6
    assert cut.losses == pytest.approx(whole.losses, abs=1e-5)


def test_a_step_of_several_batches_averages_them():
    _, outcome = tuned(replace(CONFIG, batches_per_step=3, epochs=1))
    _, single = tuned(replace(CONFIG, epochs=1, learning_rate=1e-12))
    assert outcome.losses == (pytest.approx(sum(single.losses) / 3, abs=TOLERANCE),)


def test_the_model_is_back_bit_for_bit_also_after_an_error():
    model = build("deepseek_v3")  # it has buffers
    before = copy.deepcopy(model.state_dict())

    def train_and_fail():
        with model_restored(model):
            tuned(model=model)
            with torch.no_grad():
                for buffer in model.buffers():
                    buffer.add_(1)
            assert not any(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
            raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        train_and_fail()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_buffer_that_changes_ends_the_training():
    model = build("deepseek_v3")
    name, buffer = next((name, buffer) for name, buffer in model.named_buffers() if "correction_bias" in name)
    assert tuned(model=model)[1].frozen_parameters_changed == 0

    def drift(module, args, output):
        buffer.add_(1)

    model.register_forward_hook(drift)
    with pytest.raises(FrozenChanged, match=name):
        tuned(model=model)


def test_which_parameters_ask_for_a_gradient_is_as_it_was():
    model = build("olmoe")
    first = next(model.parameters())
    first.requires_grad_(False)
    tuned(model=model)
    assert not first.requires_grad
    assert sum(parameter.requires_grad for parameter in model.parameters()) == len(list(model.parameters())) - 1


@pytest.mark.parametrize("group", ["attention", "router"])
def test_only_the_chosen_parameters_move(group):
    model = build("olmoe")
    before = copy.deepcopy(model.state_dict())
    chosen = set(parameters_of(model, group))
    _, outcome = tuned(model=model, group=group)
    moved = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert moved
    assert moved <= chosen
    assert outcome.trainable_parameters == sum(before[name].numel() for name in chosen)
    assert outcome.frozen_parameters_changed == 0


def test_after_every_step_it_says_how_many_are_done_and_of_how_many():
    steps = []
    tuned(after_step=lambda step, of: steps.append((step, of)))
    assert steps == [(number, 6) for number in range(1, 7)]


def test_a_half_precision_model_trains_on_float32_copies():
    steps = replace(CONFIG, learning_rate=1e-4, epochs=4)
    half = build("olmoe").to(torch.bfloat16)
    before = copy.deepcopy(half.state_dict())
    _, outcome = tuned(steps, half)
    assert all(parameter.dtype == torch.bfloat16 for parameter in half.parameters())
    assert outcome.losses[-1] < outcome.losses[0]
    assert any(not torch.equal(tensor, before[name]) for name, tensor in half.state_dict().items())

"""Masked fine-tuning: what moves, what does not, and that only the batch decides (invariants 6 and 9 to 12)."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, SOME_FAMILIES, batch_masks, build, hooks_left, state_of, token_ids
from policies import ROUTINGS, config_of
from training_runs import BATCHES, CONFIG, EXPERTS, assert_only_these_moved, train, union_of

from moe_ray.errors import InputError
from moe_ray.experts import Expert
from moe_ray.finetuning.schedule import plan_steps
from moe_ray.finetuning.trainable_experts import trainable_experts
from moe_ray.finetuning.trainer import MaskedTrainer
from moe_ray.models.loss import answer_loss
from moe_ray.models.moe_layers import find_moe_layers
from moe_ray.models.tokenization import TokenizedRow
from moe_ray.routing.masking import route_rows_through, route_through

# Invariants 10 and 11: what moves


@pytest.mark.slow
@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_after_training_with_weight_decay_only_the_union_differs(family):
    model = build(family)
    before = state_of(model)
    train(model)
    assert_only_these_moved(model, before, union_of(EXPERTS))


@pytest.mark.slow
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gpt_oss", "jamba"])
def test_under_every_policy_only_the_union_differs_after_training(family, routing):
    model = build(family)
    before = state_of(model)
    train(model, config_of(routing))
    assert_only_these_moved(model, before, union_of(EXPERTS))
    assert hooks_left(model) == 0


def test_after_training_with_short_layers_routed_naturally_only_the_union_differs():
    model = build("olmoe")
    before = state_of(model)
    reports = train(model, replace(CONFIG, short_layers="natural"))
    assert_only_these_moved(model, before, union_of(EXPERTS))
    assert max(batch.num_experts_routed for report in reports for batch in report.batches) <= 4


def test_the_trainer_notices_a_token_outside_a_layer_that_is_not_short(monkeypatch):
    # Layer 0 of batch 7 has as many experts as a token uses, so it is restricted though short layers are not.
    monkeypatch.setattr("moe_ray.finetuning.routing_policy.route_through", lambda model, mask_LE: nullcontext())
    with pytest.raises(RuntimeError, match="tokens reached L00"):
        train(build("olmoe"), replace(CONFIG, short_layers="natural"), per_batch={7: EXPERTS[7]})


def test_a_bfloat16_models_frozen_numbers_are_bit_identical():
    model = build("olmoe", dtype=torch.bfloat16)
    before = state_of(model)
    train(model)
    assert_only_these_moved(model, before, union_of(EXPERTS))


def step_by_step(model, trainer_check, config=CONFIG) -> None:
    """Trains; calls `trainer_check(batch_idx, before)` after each step with the state before that step."""
    before = [state_of(model)]

    def after_step(trainer, report):
        trainer_check(report.batch_idx, before[0])
        before[0] = state_of(model)

    train(model, config, after_step=after_step)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_moves_the_batchs_own_experts_and_no_others(family):
    # Over two epochs each expert is absent from a batch after it has gained momentum in another.
    model = build(family)
    step_by_step(model, lambda batch, before: assert_only_these_moved(model, before, EXPERTS[batch]))


@pytest.mark.slow
@pytest.mark.parametrize("routing", ROUTINGS)
def test_under_every_policy_a_step_moves_the_batchs_own_experts_and_no_others(routing):
    model = build("olmoe")
    step_by_step(
        model,
        lambda batch, before: assert_only_these_moved(model, before, EXPERTS[batch]),
        config_of(routing),
    )


def train_fused_with_gradient_hook(model, per_batch) -> None:
    """The naive way: AdamW on the fused tensors, gradients of other experts set to zero by a hook."""
    masks = batch_masks(model, per_batch)
    model.requires_grad_(False)
    fused = [(row, t) for row, layer in enumerate(find_moe_layers(model)) for t in layer.expert_tensors().values()]
    optimizer = torch.optim.AdamW([t.requires_grad_(True) for _, t in fused], lr=1e-2, weight_decay=0.1)
    for batch_idx in per_batch:
        mask_LE = torch.as_tensor(masks[batch_idx])
        hooks = [
            t.register_hook(lambda g, keep=mask_LE[row]: g * keep.view(-1, *[1] * (g.dim() - 1))) for row, t in fused
        ]
        with route_through(model, masks[batch_idx]):
            answer_loss(model, BATCHES[batch_idx], pad_id=0).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        for hook in hooks:
            hook.remove()


def test_a_gradient_hook_on_the_fused_tensor_is_caught_moving_other_experts():
    model = build("olmoe")
    before = state_of(model)
    train_fused_with_gradient_hook(model, {3: EXPERTS[3]})
    with pytest.raises(AssertionError):
        assert_only_these_moved(model, before, EXPERTS[3])


def test_a_gradient_hook_on_the_fused_tensor_is_caught_moving_absent_experts_by_momentum():
    model = build("olmoe")
    train_fused_with_gradient_hook(model, {3: EXPERTS[3]})
    before = state_of(model)
    train_fused_with_gradient_hook(model, {9: EXPERTS[9]})
    with pytest.raises(AssertionError):
        assert_only_these_moved(model, before, EXPERTS[9])


def test_an_absent_experts_optimiser_state_does_not_advance():
    model, seen = build("olmoe"), {pair: 0 for pair in union_of(EXPERTS)}

    def after_step(trainer, report):
        for pair in EXPERTS[report.batch_idx]:
            seen[pair] += 1
        for (row, expert), steps in seen.items():
            for parameter in trainer.trainable.parameters[Expert(row, expert)].values():
                assert trainer.optimizer.state.get(parameter, {}).get("step", 0) == steps

    train(model, after_step=after_step)
    assert sorted(set(seen.values())) == [2, 4]


# Invariant 12


def test_gradients_and_optimiser_state_exist_for_the_union_only():
    model = build("olmoe")

    def after_step(trainer, report):
        per_expert = 3 * 12 * 24
        held = sum(v.numel() for state in trainer.optimizer.state.values() for n, v in state.items() if n != "step")
        assert held <= 2 * per_expert * len(union_of(EXPERTS))
        assert all(parameter.grad is None for parameter in model.parameters())

    train(model, after_step=after_step)


# Invariants 6 and 9: each batch under its own mask


def assert_every_step_trains_the_batchs_own_experts(masks, model, **options) -> None:
    """The property, for any way of looking masks up."""
    before = [state_of(model)]

    def after_step(report):
        assert_only_these_moved(model, before[0], EXPERTS[report.batch_idx])
        before[0] = state_of(model)

    with trainable_experts(model, masks.union) as trainable:
        MaskedTrainer(model, trainable, BATCHES, masks, CONFIG, pad_id=0, seed=0, **options).run(after_step)


class MasksByPosition:
    """The naive way: the mask of the n-th batch of the original list, looked up after a batch was dropped."""

    def __init__(self, masks, kept):
        self.masks, self.kept = masks, kept
        self.union, self.selected, self.trained_batches = masks.union, masks.selected, kept

    def __getitem__(self, batch_idx):
        return self.masks.masks_BLE[self.kept.index(batch_idx)]


def test_after_dropping_a_batch_the_others_keep_their_masks():
    model = build("olmoe")
    kept = {batch: EXPERTS[batch] for batch in (3, 9)}
    assert_every_step_trains_the_batchs_own_experts(batch_masks(model, kept), model)


def test_masks_by_position_after_dropping_a_batch_are_caught():
    model = build("olmoe")
    with pytest.raises(AssertionError):
        assert_every_step_trains_the_batchs_own_experts(
            MasksByPosition(batch_masks(model, EXPERTS), (3, 9)), model, monitor=None
        )


def test_the_trainer_itself_notices_masks_by_position():
    model = build("olmoe")
    with pytest.raises(RuntimeError, match="the mask in force was not its own"):
        assert_every_step_trains_the_batchs_own_experts(MasksByPosition(batch_masks(model, EXPERTS), (3, 9)), model)


def test_the_trainer_notices_a_token_at_a_disallowed_expert(monkeypatch):
    model = build("olmoe")
    monkeypatch.setattr("moe_ray.finetuning.routing_policy.route_through", lambda model, mask_LE: nullcontext())
    with pytest.raises(RuntimeError, match="tokens reached"):
        train(model)


@pytest.mark.parametrize("routing", ["masked_unsafe", "masked_prompt", "masked_response"])
def test_the_trainer_notices_a_restricted_token_at_a_disallowed_expert(routing, monkeypatch):
    monkeypatch.setattr("moe_ray.finetuning.routing_policy.route_rows_through", lambda *args: nullcontext())
    with pytest.raises(RuntimeError, match="tokens reached"):
        train(build("olmoe"), config_of(routing))


def test_the_trainer_notices_a_mask_at_the_wrong_tokens(monkeypatch):
    def shifted(model, masks_BLE, positions_BS):
        return route_rows_through(model, masks_BLE, ~positions_BS)

    monkeypatch.setattr("moe_ray.finetuning.routing_policy.route_rows_through", shifted)
    with pytest.raises(RuntimeError, match="tokens reached"):
        train(build("olmoe"), config_of("masked_prompt"))


def test_rows_without_labels_are_refused_where_the_policy_goes_by_them(monkeypatch):
    monkeypatch.setitem(BATCHES, 3, [row._replace(is_unsafe=None) for row in BATCHES[3]])
    with pytest.raises(InputError, match="a row without a label"):
        train(build("olmoe"), config_of("masked_unsafe"))


def test_the_trainer_notices_experts_that_were_never_called(monkeypatch):
    model = build("olmoe")
    monkeypatch.setattr("moe_ray.finetuning.expert_forward.TrainedForward.install", lambda self: None)
    monkeypatch.setattr("moe_ray.finetuning.expert_forward.TrainedForward.remove", lambda self: None)
    monkeypatch.setattr("moe_ray.finetuning.gradients.torch.Tensor.backward", lambda loss: None)
    with pytest.raises(RuntimeError, match="never called under its mask"):
        train(model)


def test_no_hook_is_left_after_training():
    model = build("olmoe")
    train(model)
    assert hooks_left(model) == 0


def test_the_models_training_modes_are_restored():
    model = build("olmoe")
    model.model.layers[1].train()
    modes = [module.training for module in model.modules()]
    train(model)
    assert [module.training for module in model.modules()] == modes


# Compiled and spread models


@pytest.mark.slow
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gpt_oss", "phimoe"])
def test_a_compiled_model_trains_to_the_same_weights(family):
    plain, compiled = build(family), build(family)
    compiled.compile(backend="eager")
    with torch.no_grad():
        compiled(token_ids(2, 7))
    train(plain)
    train(compiled)
    expected = state_of(plain)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state_of(compiled).items())


def test_a_model_that_accelerate_has_spread_trains_to_the_same_weights():
    # What `device_map` does to a model, on one device: every module's forward is wrapped to move its inputs.
    import accelerate

    plain, spread = build("olmoe"), build("olmoe")
    device_map = {
        name: "cpu" for name in ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head")
    }
    device_map["model.rotary_emb"] = "cpu"
    spread = accelerate.dispatch_model(spread, device_map, main_device="cpu", force_hooks=True)
    assert hasattr(find_moe_layers(spread)[0].experts, "_hf_hook")
    train(plain)
    train(spread)
    expected = state_of(plain)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state_of(spread).items())
    assert_only_these_moved(spread, state_of(build("olmoe")), union_of(EXPERTS))


# The loop


@pytest.mark.slow
def test_training_lowers_the_loss_of_its_batches():
    reports = train(build("olmoe"), replace(CONFIG, epochs=12))
    assert sum(r.loss for r in reports[-3:]) < 0.8 * sum(r.loss for r in reports[:3])


def test_the_same_seed_gives_the_same_weights():
    first, second = build("olmoe"), build("olmoe")
    train(first)
    train(second)
    assert all(torch.equal(tensor, state_of(second)[name]) for name, tensor in state_of(first).items())


def test_training_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(build("olmoe"))
    assert torch.equal(torch.rand(3), expected)


def test_a_report_says_what_the_step_did():
    report = next(r for r in train(build("olmoe")) if r.batch_idx == 7)
    assert (report.num_experts, report.num_tokens, report.epoch) == (4, 9, 0)
    (batch,) = report.batches
    assert (batch.num_experts, batch.num_tokens, batch.num_input_tokens) == (4, 9, 24)
    assert 1 <= batch.num_experts_routed <= 4
    assert report.learning_rate == 1e-2
    assert report.tokens_per_second == pytest.approx(24 / report.seconds)
    assert report.validation_loss is None


def test_a_batchs_weight_multiplies_the_step_of_its_experts():
    # One step, before which AdamW has no memory: the step is proportional to the weight, but for gradients near its epsilon.
    moved = {}
    for weight in (1.0, 3.0, 0.5):
        model = build("olmoe")
        before = state_of(model)
        config = replace(CONFIG, epochs=1, weight_decay=0.0, max_grad_norm=0.0)
        train(model, config, per_batch={3: EXPERTS[3]}, batch_weights={3: weight})
        moved[weight] = {name: tensor - before[name] for name, tensor in state_of(model).items()}
    assert any(step.abs().max() > 1e-3 for step in moved[1.0].values())
    for name, step in moved[1.0].items():
        for weight in (3.0, 0.5):
            torch.testing.assert_close(moved[weight][name], weight * step, atol=2e-5, rtol=1e-3)


def test_in_a_step_of_several_batches_gradients_count_by_weight():
    def after(weights):
        model = build("olmoe")
        config = replace(CONFIG, epochs=1, batches_per_step=2, weight_decay=0.0)
        train(model, config, per_batch={3: EXPERTS[3], 7: EXPERTS[7]}, batch_weights=weights)
        return state_of(model)

    # Expert (0, 5) is shared; a batch of weight 0 leaves it to the other, which then moves it by half a step.
    alone = build("olmoe")
    before = state_of(alone)
    train(alone, replace(CONFIG, epochs=1, weight_decay=0.0), per_batch={3: EXPERTS[3]})
    name = "model.layers.0.mlp.experts.down_proj"
    shared = after({7: 0.0})[name][5] - before[name][5]
    torch.testing.assert_close(shared, 0.5 * (state_of(alone)[name][5] - before[name][5]), atol=1e-6, rtol=1e-3)
    assert not torch.equal(after({7: 3.0})[name][5], after({})[name][5])


def test_a_batch_of_weight_zero_teaches_nothing():
    model = build("olmoe")
    before = state_of(model)
    config = replace(CONFIG, weight_decay=0.0)
    train(model, config, per_batch={3: EXPERTS[3]}, batch_weights={3: 0.0})
    assert_only_these_moved(model, before, set())


def test_a_warm_up_is_seen_in_the_reports():
    reports = train(build("olmoe"), replace(CONFIG, warmup=0.5, schedule="linear"))
    assert [r.learning_rate for r in reports] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2, 2e-2 / 3, 1e-2 / 3])


def losses_then_stop(losses, patience, epochs=6):
    values = iter(losses)
    config = replace(CONFIG, epochs=epochs, patience=patience)
    return train(build("olmoe"), config, per_batch={3: EXPERTS[3]}, validate=lambda: next(values))


def test_training_stops_when_the_validation_loss_has_stopped_falling():
    assert len(losses_then_stop([3.0, 2.0, 2.5, 2.0, 1.0, 0.5], patience=2)) == 4


def test_without_patience_all_epochs_are_trained():
    reports = losses_then_stop([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], patience=0)
    assert [report.validation_loss for report in reports] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_validation_sees_the_tuned_model_under_natural_routing():
    model, seen = build("olmoe"), []
    ids = token_ids(1, 7)
    train(model, per_batch={3: EXPERTS[3]}, validate=lambda: seen.append(model(ids).logits.detach()) or 1.0)
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[-1], model(ids).logits)


# Invariant 17


def test_patience_without_validation_is_refused():
    with pytest.raises(InputError, match=r"finetune\.patience is on"):
        train(build("olmoe"), replace(CONFIG, patience=1))


def test_a_batch_without_rows_is_refused():
    with pytest.raises(InputError, match=r"no training rows for batches \[4\]"):
        train(build("olmoe"), per_batch={**EXPERTS, 4: [(0, 0)]})


def test_a_batch_without_answer_tokens_is_refused(monkeypatch):
    monkeypatch.setitem(BATCHES, 3, [TokenizedRow([3, 4], [])])
    with pytest.raises(InputError, match="nothing to learn"):
        train(build("olmoe"))


@pytest.mark.parametrize("done", [0, 1, 2, 4])
def test_before_an_epoch_it_says_which_batches_it_still_trains_in_it(done):
    model, asked = build("olmoe"), []
    masks = batch_masks(model, EXPERTS)
    with trainable_experts(model, masks.union) as trainable:
        trainer = MaskedTrainer(
            model, trainable, BATCHES, masks, CONFIG, pad_id=0, seed=0, before_epoch=lambda ids: asked.append(list(ids))
        )
        trainer.next_step = done
        trainer.run()
    steps = [batch for step in trainer.plan for batch in step]
    epochs = [steps[max(done, start) : start + 3] for start in (0, 3)]
    assert asked == [epoch for epoch in epochs if epoch]


def test_the_plan_is_that_of_the_configured_window():
    model, lengths = build("olmoe"), {batch: 7 * batch % 24 for batch in range(24)}
    masks = batch_masks(model, {batch: [(0, 1)] for batch in lengths})
    plans = []
    with trainable_experts(model, masks.union) as trainable:
        for window in (0, 3):
            config = replace(CONFIG, batches_per_step=2, length_window=window)
            rows = dict.fromkeys(lengths, BATCHES[7])
            trainer = MaskedTrainer(model, trainable, rows, masks, config, pad_id=0, seed=0, lengths=lengths)
            plans.append(trainer.plan)
            assert trainer.plan == plan_steps(
                range(24), epochs=2, batches_per_step=2, seed=0, lengths=lengths, window=window
            )
    assert plans[0] != plans[1]


def test_a_batch_without_unsafe_experts_is_not_trained():
    reports = train(build("olmoe"), per_batch={**EXPERTS, 3: []})
    assert {report.batch_idx for report in reports} == {7, 9}


@pytest.mark.parametrize(
    ("rate", "dtype", "num_steps"),
    [(3e38, torch.float32, 0), (7e4, torch.float16, 0), (float("nan"), torch.float32, 2)],
)
def test_an_update_that_gives_infinite_or_undefined_weights_is_never_kept(rate, dtype, num_steps):
    """Too large for the type of the trained copies, or for the model's, which is what would be used."""
    model, done = build("olmoe", dtype=dtype), []
    config = replace(CONFIG, learning_rate=1e-6 if math.isnan(rate) else rate, max_grad_norm=1.0, weight_decay=0.0)
    states = [state_of(model)]

    def after_step(trainer, report):
        done.append(report.step)
        states.append(state_of(model))
        if math.isnan(rate) and len(done) == num_steps:
            for group in trainer.optimizer.param_groups:
                group["weight_decay"] = rate

    with pytest.raises(
        InputError, match=r"step \d: after the update \d+ experts of layers \[.*nothing of this step"
    ) as error:
        train(model, config, after_step=after_step)
    assert "such as L0" in str(error.value)
    assert done == list(range(num_steps))
    assert all(torch.equal(tensor, states[-1][name]) for name, tensor in state_of(model).items())
    assert all(tensor.isfinite().all() for tensor in state_of(model).values())


def test_a_gradient_that_is_not_finite_stops_training_before_it_moves_anything():
    model = build("olmoe")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.inf
    before = state_of(model)
    with pytest.raises(InputError, match=r"lower finetune\.learning_rate"):
        train(model)
    assert_only_these_moved(model, before, set())

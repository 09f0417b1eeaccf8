"""Routers that learn too: only they move in their steps, and not far from the base model (invariants 10 to 16)."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from families import SOME_FAMILIES, batch_masks, build, hooks_left, rows, state_of
from training_runs import BATCHES, CONFIG, EXPERTS, changes, train, union_of

from moe_ray.config.finetune import FinetuneConfig
from moe_ray.errors import InputError
from moe_ray.experts import Expert, Router
from moe_ray.finetuning.adapter import (
    adapter_applied,
    apply_adapter,
    expert_weights,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from moe_ray.finetuning.adapter_files import read_adapter_header
from moe_ray.finetuning.adapter_tensors import hash_weights
from moe_ray.finetuning.checkpoint import load_checkpoint, save_checkpoint
from moe_ray.finetuning.fine_tune import FineTuned, continue_fine_tuning, learned_parts
from moe_ray.finetuning.frozen import count_changed, hash_frozen
from moe_ray.finetuning.router_training import RouterTraining
from moe_ray.finetuning.trainable_experts import trainable_experts
from moe_ray.finetuning.trainer import MaskedTrainer
from moe_ray.models.loss import answer_loss
from moe_ray.models.moe_layers import find_moe_layers
from moe_ray.models.tokenization import pad_rows

ALTERNATING = replace(CONFIG, routing="natural", router="alternating", router_learning_rate=1e-2)
TOLERANCE = 1e-5  # float32, of gradients relative to their largest entry


def router_names(model) -> set[str]:
    """Names of the parameters of the routers' linear maps."""
    own = {id(tensor) for layer in find_moe_layers(model) for tensor in layer.router_tensors().values()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in own}


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_only_the_union_and_the_routers_differ_after_training(family):
    model = build(family)
    before, flags = state_of(model), [parameter.requires_grad for parameter in model.parameters()]
    train(model, ALTERNATING)
    others, moved = changes(model, before)
    assert others == router_names(model)
    assert len(others) >= len(find_moe_layers(model))
    assert moved == union_of(EXPERTS)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert hooks_left(model) == 0


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["masked", "masked_unsafe"])
def test_under_a_mask_the_routers_learn_too(routing):
    model = build("olmoe")
    before = state_of(model)
    train(model, replace(ALTERNATING, routing=routing))
    assert changes(model, before) == (router_names(model), union_of(EXPERTS))


def test_routers_move_after_every_so_many_steps_and_not_between():
    model, moved = build("olmoe"), []
    before = [state_of(model)]

    def after_step(trainer, report):
        moved.append(bool(changes(model, before[0])[0]))
        before[0] = state_of(model)

    train(model, replace(ALTERNATING, router_every=3), after_step=after_step)
    assert moved == [False, False, True, False, False, True]


def routers_of(model, trainable, config=ALTERNATING):
    return RouterTraining(model, trainable, config, pad_id=0, world_size=1)


def test_a_step_of_the_routers_moves_no_expert_and_keeps_no_state_of_one():
    model = build("olmoe")
    with trainable_experts(model, batch_masks(model, EXPERTS).union) as trainable:
        routers = routers_of(model, trainable)
        for parameter in trainable.all_parameters():
            parameter.data.mul_(1.1)
        trainable.write_back(trainable.union_LE)
        before = state_of(model)
        routers.step([(BATCHES[7], 1.0)], total_weight=1.0, rate=1.0)
    assert changes(model, before) == (router_names(model), set())
    held = sum(state["exp_avg"].numel() for state in routers.optimizer.state.values())
    assert held == sum(tensor.numel() for layer in find_moe_layers(model) for tensor in layer.router_tensors().values())


def logits_of(model, batch):
    """Per layer the (B, S, E) router logits: what a router receives times its weight."""
    padded, logits, handles = pad_rows(batch, pad_id=0), [], []
    for layer in find_moe_layers(model):
        multiply = partial(lambda weight, module, args: logits.append(args[0] @ weight.T), layer.router.weight)
        handles.append(layer.router.register_forward_pre_hook(multiply))
    model(input_ids=padded.input_ids_BS, attention_mask=padded.attention_mask_BS)
    for handle in handles:
        handle.remove()
    return [some.view(*padded.input_ids_BS.shape, -1) for some in logits]


def as_the_definition_says(model, base, batch, config):
    """The gradient of the routers' weights, row by row and token by token."""
    loss = answer_loss(model, batch, pad_id=0).sum() / sum(len(row.answer_ids) for row in batch)
    with torch.no_grad():
        first = logits_of(base, batch)
    now = logits_of(model, batch)
    for factor, label in ((config.router_consistency, False), (config.router_drift, True)):
        moved = [
            (before[n, s].softmax(-1) * (before[n, s].log_softmax(-1) - after[n, s].log_softmax(-1))).sum()
            for before, after in zip(first, now, strict=True)
            for n, row in enumerate(batch)
            for s in range(row.num_tokens)
            if row.is_unsafe is label
        ]
        loss = loss + factor * torch.stack(moved).mean()
    return torch.autograd.grad(loss, [layer.router.weight for layer in find_moe_layers(model)])


@pytest.mark.slow
@pytest.mark.parametrize("limits", [{}, {"rows_per_forward": 1}, {"tokens_per_forward": 12}])
def test_the_routers_gradient_is_that_of_the_definition_however_the_batch_is_cut(limits):
    model, base = build("olmoe"), build("olmoe")
    config = replace(ALTERNATING, router_consistency=2.0, router_drift=0.5, **limits)
    with trainable_experts(model, batch_masks(model, EXPERTS).union) as trainable:
        routers = routers_of(model, trainable, config)
        with torch.no_grad():
            for parameter in [*trainable.all_parameters(), *routers.all_parameters()]:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        trainable.write_back(trainable.union_LE)
        routers.write_back()
        tuned = state_of(model)
        routers._add_gradient(BATCHES[9], 3.0)
        got = [parameter.grad for parameter in routers.all_parameters()]
    assert all(torch.equal(tensor, tuned[name]) for name, tensor in state_of(model).items())
    expected = as_the_definition_says(copy.deepcopy(model).requires_grad_(True), base, BATCHES[9], config)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one / 3 / other.abs().max(), other / other.abs().max(), atol=TOLERANCE, rtol=0)


def drift(config):
    """How far routing is from the base model's after a training, on safe and on unsafe tokens (nats)."""
    model, base = build("olmoe"), build("olmoe")
    train(model, replace(config, epochs=4))
    moved = {True: [], False: []}
    with torch.no_grad():
        for batch in BATCHES.values():
            pairs = zip(logits_of(base, batch), logits_of(model, batch), strict=True)
            for before, after in pairs:
                log_before, log_after = before.log_softmax(-1), after.log_softmax(-1)
                divergence_BS = F.kl_div(log_after, log_before, log_target=True, reduction="none").sum(-1)
                for n, row in enumerate(batch):
                    moved[row.is_unsafe].append(divergence_BS[n, : row.num_tokens].mean())
    return {label: float(torch.stack(values).mean()) for label, values in moved.items()}


@pytest.mark.slow
def test_consistency_keeps_the_routing_of_safe_prompts_and_drift_that_of_unsafe_ones():
    free = drift(replace(ALTERNATING, router_consistency=0.0))
    consistent = drift(replace(ALTERNATING, router_consistency=20.0))
    still = drift(replace(ALTERNATING, router_consistency=0.0, router_drift=20.0))
    assert consistent[False] < 0.8 * free[False]
    assert still[True] < 0.8 * free[True]


def run(model, *, folder=None, kill_at=None, resume=False):
    masks = batch_masks(model, EXPERTS)
    with trainable_experts(model, masks.union) as trainable:
        trainer = MaskedTrainer(model, trainable, BATCHES, masks, ALTERNATING, pad_id=0, seed=0)
        if resume:
            load_checkpoint(trainer, folder)

        def after_step(report):
            if trainer.next_step == kill_at:
                save_checkpoint(trainer, folder)
                raise KeyboardInterrupt

        if kill_at is None:
            trainer.run()
        else:
            with pytest.raises(KeyboardInterrupt):
                trainer.run(after_step)


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    whole, resumed = build("olmoe"), build("olmoe")
    run(whole)
    run(build("olmoe"), folder=tmp_path, kill_at=3)
    run(resumed, folder=tmp_path, resume=True)
    assert all(torch.equal(tensor, state_of(resumed)[name]) for name, tensor in state_of(whole).items())


def learn(model, folder, per_batch=EXPERTS, config=ALTERNATING) -> FineTuned:
    """Trains as `fine_tune` does and saves the adapter."""
    masks = batch_masks(model, per_batch)
    base_hash = hash_weights(expert_weights(model, learned_parts(masks, config)))
    with trainable_experts(model, masks.union) as trainable:
        trainer = MaskedTrainer(model, trainable, BATCHES, masks, config, pad_id=0, seed=0)
        trainer.run()
        routers = None if trainer.routers is None else trainer.routers.parameters
        save_adapter(folder, trainable, base="base", base_hash=base_hash, mask_hash=masks.digest(), routers=routers)
    return FineTuned(reports=(), trainable_parameters=0, total_parameters=0, frozen_parameters_changed=0)


def test_the_adapter_holds_the_routers_and_gives_the_trained_model_back(tmp_path):
    trained, other = build("olmoe"), build("olmoe")
    learn(trained, tmp_path)
    header, tensors = load_adapter(tmp_path)
    assert header["routers"] == list(find_moe_layers(trained).layers)
    assert {part for part in tensors if isinstance(part, Router)} == {Router(0), Router(1)}
    before = state_of(other)
    with adapter_applied(other, tmp_path):
        assert all(torch.equal(tensor, state_of(trained)[name]) for name, tensor in state_of(other).items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(other).items())


def test_a_merged_checkpoint_has_the_trained_routers(tmp_path):
    trained = build("olmoe")
    learn(trained, tmp_path / "adapter")
    merge_adapter(build("olmoe"), tmp_path / "adapter", tmp_path / "merged")
    merged = type(trained).from_pretrained(tmp_path / "merged")
    assert all(torch.equal(tensor, state_of(trained)[name]) for name, tensor in state_of(merged).items())


@pytest.mark.slow
def test_an_adapter_with_routers_is_refused_by_a_base_with_others(tmp_path):
    learn(build("olmoe"), tmp_path)
    other = build("olmoe")
    with torch.no_grad():
        find_moe_layers(other)[0].router.weight.add_(0.1)
    with pytest.raises(InputError, match="not those it was trained from"):
        apply_adapter(other, tmp_path)


def test_an_adapter_without_routers_is_as_it_always_was(tmp_path):
    learn(build("olmoe"), tmp_path, config=CONFIG)
    header = json.loads((tmp_path / "adapter.json").read_text())
    assert header["format"] == 1
    assert "routers" not in header
    assert all(isinstance(part, Expert) for part in load_adapter(tmp_path)[1])


@pytest.mark.slow
@pytest.mark.parametrize("first", ["frozen", "alternating"])
@pytest.mark.parametrize("second", ["frozen", "alternating"])
def test_rounds_compose_whichever_of_them_trained_routers(first, second, tmp_path):
    configs = [replace(ALTERNATING, router=router) for router in (first, second)]
    learn(build("olmoe"), tmp_path / "first", {3: EXPERTS[3]}, configs[0])
    model = build("olmoe")
    continue_fine_tuning(
        model,
        tmp_path / "first",
        tmp_path / "both",
        batch_masks(model, {7: EXPERTS[7]}),
        lambda folder: learn(model, folder, {7: EXPERTS[7]}, configs[1]),
        config=configs[1],
        saves=True,
    )
    assert bool(read_adapter_header(tmp_path / "both").get("routers")) == ("alternating" in (first, second))
    again = build("olmoe")
    apply_adapter(again, tmp_path / "both")
    assert all(torch.equal(tensor, state_of(model)[name]) for name, tensor in state_of(again).items())


def test_frozen_tensors_are_all_but_the_union_and_the_routers_that_train():
    model = build("olmoe")
    union_LE = batch_masks(model, EXPERTS).union
    everything, without = (hash_frozen(model, union_LE, routers_train=train) for train in (False, True))
    assert set(everything) - set(without) == router_names(model)
    with torch.no_grad():
        find_moe_layers(model)[0].router.weight.add_(1.0)
    assert count_changed(everything, hash_frozen(model, union_LE)) > 0
    assert count_changed(without, hash_frozen(model, union_LE, routers_train=True)) == 0


def test_a_bfloat16_models_routers_are_trained_in_float32():
    model = build("olmoe", dtype=torch.bfloat16)
    with trainable_experts(model, batch_masks(model, EXPERTS).union) as trainable:
        routers = routers_of(model, trainable)
        routers.step([(rows((5, 4), (3, 2)), 1.0)], total_weight=1.0, rate=1.0)
        assert all(parameter.dtype == torch.float32 for parameter in routers.all_parameters())
    weight = find_moe_layers(model)[0].router.weight
    assert torch.equal(weight, routers.parameters[Router(0)]["weight"].bfloat16())


def test_activation_checkpointing_is_refused_where_the_loss_sees_logits():
    with pytest.raises(InputError, match=r"finetune\.activation_checkpointing: got True, expected false with"):
        FinetuneConfig(router="alternating", activation_checkpointing=True)


def test_consistency_on_safe_prompts_is_refused_where_none_is_trained_on():
    with pytest.raises(InputError, match=r"finetune\.router_consistency: got 1\.0, expected 0 with"):
        FinetuneConfig(router="alternating", learn_from="unsafe")
    assert FinetuneConfig(router="alternating", learn_from="unsafe", router_consistency=0.0).router == "alternating"

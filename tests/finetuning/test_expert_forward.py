"""Experts that are modules of their own: the same counts, masks, gradients and adapters as for the fused tensors."""

from __future__ import annotations

import pytest
import torch
from families import batch_masks, build, mask, state_of, token_ids
from torch import nn
from training_runs import BATCHES, CONFIG, EXPERTS, train

from moe_ray.config.finetune import FinetuneConfig
from moe_ray.errors import InputError
from moe_ray.finetuning.adapter import adapter_applied, apply_adapter, expert_weights, save_adapter
from moe_ray.finetuning.adapter_tensors import hash_weights
from moe_ray.finetuning.expert_forward import TrainedForward
from moe_ray.finetuning.frozen import count_changed, hash_frozen
from moe_ray.finetuning.gradients import accumulate_gradient
from moe_ray.finetuning.trainable_experts import trainable_experts
from moe_ray.finetuning.trainer import MaskedTrainer
from moe_ray.models.moe_layers import find_moe_layers
from moe_ray.routing.masking import route_through

IDS = token_ids(3, 11)
LOGIT_TOLERANCE = 1e-5  # float32, logits of order 5


class OneExpert(nn.Module):
    """What the fused tensors hold for one expert."""

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor):
        super().__init__()
        self.gate_up = nn.Linear(gate_up.shape[1], gate_up.shape[0], bias=False)
        self.down = nn.Linear(down.shape[1], down.shape[0], bias=False)
        with torch.no_grad():
            self.gate_up.weight.copy_(gate_up)
            self.down.weight.copy_(down)

    def forward(self, hidden):
        gate, up = self.gate_up(hidden).chunk(2, dim=-1)
        return self.down(nn.functional.silu(gate) * up)


class ListedExperts(nn.ModuleList):
    """As custom models keep them: a list of modules, called with the experts interface."""

    def __init__(self, fused: nn.Module):
        super().__init__(OneExpert(*pair) for pair in zip(fused.gate_up_proj, fused.down_proj, strict=True))
        self.num_experts = fused.num_experts

    def forward(self, hidden_states, top_k_index, top_k_weights):
        output = torch.zeros_like(hidden_states)
        for expert, module in enumerate(self):
            tokens, slots = (top_k_index == expert).nonzero(as_tuple=True)
            output = output.index_add(0, tokens, module(hidden_states[tokens]) * top_k_weights[tokens, slots, None])
        return output


def build_listed():
    model = build("olmoe")
    for layer in model.model.layers:
        layer.mlp.experts = ListedExperts(layer.mlp.experts)
    return model.eval()


def fused_state(model):
    """The listed model's expert weights, as the fused model names them."""
    return {
        (row, expert): [t.detach().clone() for t in layer.tensors_of(expert).values()]
        for row, layer in enumerate(find_moe_layers(model))
        for expert in range(layer.num_experts)
    }


def test_they_are_found():
    layers = find_moe_layers(build_listed())
    assert [(layer.layer, layer.num_experts, len(layer.expert_modules())) for layer in layers] == [(0, 8, 8), (1, 8, 8)]
    assert set(layers[0].tensors_of(3)) == {"gate_up.weight", "down.weight"}


def test_a_list_without_a_forward_of_its_own_is_refused():
    model = build_listed()
    for layer in model.model.layers:
        layer.mlp.experts = type("PlainExperts", (nn.ModuleList,), {"num_experts": 8})(list(layer.mlp.experts))
    with pytest.raises(InputError, match="no Mixture-of-Experts layer that moe-ray can read"):
        find_moe_layers(model)


def test_a_mask_has_the_same_effect():
    mask_LE = mask(build("olmoe"), (0, 2, 5), (4,))
    logits = []
    for model in (build("olmoe"), build_listed()):
        with route_through(model, mask_LE), torch.no_grad():
            logits.append(model(IDS).logits)
    torch.testing.assert_close(logits[0], logits[1], atol=LOGIT_TOLERANCE, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["masked", "natural"])
def test_training_moves_the_union_only_and_as_far(routing):
    config = CONFIG if routing == "masked" else type(CONFIG)(**{**vars(CONFIG), "routing": routing})
    fused, listed = build("olmoe"), build_listed()
    before, frozen = fused_state(listed), hash_frozen(listed, batch_masks(listed, EXPERTS).union)
    reports = [train(model, config) for model in (fused, listed)]
    moved = [report.output_movement for report in reports[0]]
    assert [report.output_movement for report in reports[1]] == [pytest.approx(layers, rel=1e-3) for layers in moved]
    expected, got = fused_state(fused), fused_state(listed)
    for expert, tensors in got.items():
        for one, other in zip(tensors, expected[expert], strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    moved = {e for e, tensors in got.items() if not all(map(torch.equal, tensors, before[e]))}
    assert moved == {pair for pairs in EXPERTS.values() for pair in pairs}
    assert count_changed(frozen, hash_frozen(listed, batch_masks(listed, EXPERTS).union)) == 0


def test_a_changed_frozen_expert_is_noticed():
    model = build_listed()
    union = batch_masks(model, EXPERTS).union
    before = hash_frozen(model, union)
    with torch.no_grad():
        model.model.layers[0].mlp.experts[7].down.weight[0, 0] += 1.0
    assert count_changed(before, hash_frozen(model, union)) == 24 * 12


def test_an_adapter_makes_the_round_trip(tmp_path):
    model, masks = build_listed(), batch_masks(build_listed(), EXPERTS)
    base_hash = hash_weights(expert_weights(model, list(masks.union_experts)))
    with trainable_experts(model, masks.union) as trainable:
        MaskedTrainer(model, trainable, BATCHES, masks, CONFIG, pad_id=0, seed=0).run()
        save_adapter(tmp_path, trainable, base="", base_hash=base_hash, mask_hash="")
    again = build_listed()
    before = state_of(again)
    with adapter_applied(again, tmp_path):
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(again).items())
    with pytest.raises(InputError, match="shapes"):
        apply_adapter(build("olmoe"), tmp_path)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3"])
def test_without_choosing_tokens_beforehand_gradients_and_weights_are_the_same(family, monkeypatch):
    """Grouped products skip ids beyond the last expert; the other way is by tokens, which the host has to know."""
    given = []
    for skips in (True, False):
        model = build(family)
        model.config._experts_implementation = "grouped_mm"
        mask_LE = mask(model, (1, 4, 6), (2,))
        with monkeypatch.context() as patched, trainable_experts(model, mask_LE) as trainable:
            if not skips:
                patched.setattr(TrainedForward, "_skips_ids_beyond", lambda self: False)
            gradient = accumulate_gradient(
                model, trainable, BATCHES[7], mask_LE, config=FinetuneConfig(routing="natural"), pad_id=0
            )
            given.append((gradient.loss, [p.grad for p in trainable.all_parameters()]))
        assert all(layer.experts._is_expert_parallel is False for layer in find_moe_layers(model))
    (loss, gradients), (other_loss, others) = given
    assert loss == pytest.approx(other_loss, rel=1e-6)
    for one, other in zip(gradients, others, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)

"""Routers that adapt to what the experts learned: after every so many steps of the experts, a step of the routers alone.

Experts and routers never move together. The experts learn under fixed routers; then, with the experts fixed, the routers of
all MoE layers take a step on the same batches under natural routing. Its loss is that of the target responses, plus how far
routing has moved from the base model's: on tokens of safe prompts and their targets (`finetune.router_consistency`), and of
unsafe ones (`finetune.router_drift`). Both are KL(base || now) of the softmax over a layer's expert logits, in nats,
averaged over tokens and layers. The base's distribution is what the whole base model has for the same tokens, with its own
experts, not what its routers say to what the tuned model computes.

Source: RASA (Liang et al. 2026, arXiv 2602.04448) alternates phases of experts and of routers and keeps routing consistent
with that in safety-aligned contexts. Deviations: phases are steps, and what routing is kept at is the base model's on safe
prompts. SafeMoE (Kim et al. 2025, arXiv 2509.22745) penalises the drift of routing on harmful prompts from the initial
model's; there experts and routers learn together.

Shape suffixes: B rows, S positions, T = B*S tokens, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_ray.config.finetune import FinetuneConfig
from moe_ray.errors import InputError, NotTrainable
from moe_ray.experts import Router
from moe_ray.finetuning.adapter import expert_weights, put_weights
from moe_ray.finetuning.adapter_tensors import Part
from moe_ray.finetuning.collectives import gradient_or_zeros, sum_gradients
from moe_ray.finetuning.optimizer import adamw
from moe_ray.finetuning.routing_policy import RoutingPolicy
from moe_ray.finetuning.trainable_experts import TrainableExperts
from moe_ray.models.loss import answer_loss, micro_batches
from moe_ray.models.moe_layers import MoELayer, find_moe_layers, uncompiled
from moe_ray.models.tokenization import TokenizedRow
from moe_ray.routing.layer_mask import EditedRouter, function_modes_ended

_ALL, _UNSAFE = RoutingPolicy(kind="masked"), RoutingPolicy(kind="masked_unsafe")
"""Their restricted tokens are all tokens of a pass, padding left out, and those of unsafe prompts."""


class RouterTraining:
    """The routers of all MoE layers as parameters of their own, and their steps.

    Args:
        model: the base model, before any training.
        trainable: its experts that train, which `step` leaves as they are.
        config: settings `router_*`, `max_grad_norm` and sizes of micro-batches.
        pad_id: token id that fills padding.
        world_size: workers that share a step's batches.

    Attributes:
        parameters: per router its tensors by name, as float parameters.
        optimizer: over them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        trainable: TrainableExperts,
        config: FinetuneConfig,
        *,
        pad_id: int,
        world_size: int,
    ) -> None:
        self.model, self.trainable, self.config = model, trainable, config
        self.pad_id, self.world_size = pad_id, world_size
        self._layers = tuple(find_moe_layers(model))
        routers = [Router(layer.layer) for layer in self._layers]
        # What the model is before training, to compare its routing with; a copy of the union and of the routers only.
        self._base = expert_weights(model, [*trainable.parameters, *routers])
        self.parameters: dict[Part, dict[str, nn.Parameter]] = {
            router: {
                name: nn.Parameter(tensor.to(trainable.dtype, copy=True)) for name, tensor in self._base[router].items()
            }
            for router in routers
        }
        # No weight decay: it would move routers towards equal choices, whatever the loss says.
        self.optimizer = adamw(self.all_parameters(), learning_rate=config.router_learning_rate, weight_decay=0.0)

    def all_parameters(self) -> list[nn.Parameter]:
        """Every parameter, by layer and name."""
        return [parameter for tensors in self.parameters.values() for parameter in tensors.values()]

    def is_due(self, step: int) -> bool:
        """Whether the routers take a step after the experts' (0-based) one."""
        return (step + 1) % self.config.router_every == 0

    def step(
        self, batches: Sequence[tuple[Sequence[TokenizedRow], float]], *, total_weight: float, rate: float
    ) -> None:
        """One step of the routers; all workers make the same one.

        Args:
            batches: this worker's of the step, each with its weight.
            total_weight: of the step's batches, on all workers.
            rate: the share of the full learning rate (0 to 1).

        Raises:
            NotTrainable: the gradient is not finite, or the routers are not after the step; the model has not changed.
        """
        for rows, weight in batches:
            self._add_gradient(rows, weight / (total_weight or 1.0))
        parameters = self.all_parameters()
        for parameter in parameters:
            parameter.grad = gradient_or_zeros(parameter)
        if self.world_size > 1:
            sum_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm or math.inf).item()
        if not math.isfinite(norm):
            raise NotTrainable(
                f"the routers' gradient has norm {norm}; lower finetune.router_learning_rate or finetune.learning_rate"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.router_learning_rate * rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        largest = torch.nn.utils.get_total_norm(parameters, norm_type=math.inf).item()
        if not largest <= torch.finfo(next(self.model.parameters()).dtype).max:
            raise NotTrainable(
                "after the update the routers hold infinite or undefined weights; nothing of this step was saved, and what "
                "was saved before it stays; lower finetune.router_learning_rate or finetune.learning_rate"
            )
        self.write_back()

    @torch.no_grad()
    def write_back(self) -> None:
        """Copies the parameters into the model's own routers."""
        put_weights(self.model, self.parameters)

    def _add_gradient(self, rows: Sequence[TokenizedRow], weight: float) -> None:
        config = self.config
        num_answer_tokens = sum(len(row.answer_ids) for row in rows)
        num_tokens = {label: sum(row.num_tokens for row in rows if row.is_unsafe is label) for label in (True, False)}
        tensors = [tensor for layer in self._layers for tensor in layer.router_tensors().values()]
        for group in micro_batches(
            rows,
            rows_per_forward=config.rows_per_forward,
            tokens_per_forward=config.tokens_per_forward,
            tokens_of_a_pass=config.tokens_of_a_pass,
        ):
            with self._base_in_force(), torch.no_grad(), logits_seen(self._layers) as base_logits:
                answer_loss(self.model, group, pad_id=self.pad_id)
            with _requiring_gradients(tensors), logits_seen(self._layers) as logits:
                loss = answer_loss(self.model, group, pad_id=self.pad_id).sum() / num_answer_tokens
                moved_BS = self._moved(group, logits, base_logits)
                unsafe_BS = torch.as_tensor(_UNSAFE.restricted_tokens(group), device=moved_BS.device)
                token_BS = torch.as_tensor(_ALL.restricted_tokens(group), device=moved_BS.device)
                for factor, label, chosen_BS in (
                    (config.router_consistency, False, token_BS & ~unsafe_BS),
                    (config.router_drift, True, unsafe_BS),
                ):
                    if factor and num_tokens[label]:
                        # By the tokens of the whole batch, as the loss: micro-batches change memory, not the result.
                        loss = loss + factor * moved_BS[chosen_BS].sum() / num_tokens[label]
                gradients = torch.autograd.grad(loss * weight, tensors, allow_unused=True)
            for parameter, gradient in zip(self.all_parameters(), gradients, strict=True):
                if gradient is not None:
                    parameter.grad = gradient_or_zeros(parameter) + gradient.to(parameter.dtype)

    def _moved(self, rows: Sequence[TokenizedRow], logits: Sequence[Tensor], base_logits: Sequence[Tensor]) -> Tensor:
        """(B, S): how far the routing of each token has moved from the base model's, in nats, averaged over layers."""
        size = (len(rows), max(row.num_tokens for row in rows))
        of_layers = []
        for layer, now, base in zip(self._layers, logits, base_logits, strict=True):
            if now.shape[0] != size[0] * size[1]:
                raise InputError(
                    f"{layer.name}: its router saw {now.shape[0]} tokens in a pass of {size[0] * size[1]} (rows x "
                    "positions); set finetune.router=frozen, or choose another model.path"
                )
            log_now_TE, log_base_TE = (F.log_softmax(some.float(), dim=-1) for some in (now, base))
            divergence_T = F.kl_div(log_now_TE, log_base_TE, log_target=True, reduction="none").sum(dim=1)
            of_layers.append(divergence_T.to(self.model.device))
        return torch.stack(of_layers).mean(dim=0).view(size)

    @contextmanager
    def _base_in_force(self) -> Iterator[None]:
        """The model is the base model inside the context; afterwards it has what was learned again."""
        put_weights(self.model, self._base)
        try:
            yield
        finally:
            self.trainable.write_back(self.trainable.union_LE)
            self.write_back()


@contextmanager
def logits_seen(layers: Sequence[MoELayer]) -> Iterator[list[Tensor]]:
    """A list with the (T, E) logits of each layer's router in the pass that ran last inside, with their gradient."""
    seen = [torch.empty(0)] * len(layers)
    with function_modes_ended(), ExitStack() as stack, uncompiled():
        for number, layer in enumerate(layers):
            EditedRouter(layer, partial(_noted, seen, number, layer.num_experts)).attach(stack)
        yield seen


def _noted(seen: list[Tensor], number: int, num_experts: int, logits: Tensor) -> Tensor:
    seen[number] = logits.reshape(-1, logits.shape[-1])[:, :num_experts]
    return logits


@contextmanager
def _requiring_gradients(tensors: Sequence[Tensor]) -> Iterator[None]:
    for tensor in tensors:
        tensor.requires_grad_(True)
    try:
        yield
    finally:
        for tensor in tensors:
            tensor.requires_grad_(False)

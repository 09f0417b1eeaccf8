"""Trainable experts: the union's experts as separate parameters, everything else frozen.

What trains is one parameter per expert and tensor, not a slice of the fused `(experts, …)` tensor: an expert that is not
in the batch then has no gradient at all, AdamW skips it, and gradient and optimiser state exist for the union only. While a
batch trains, its experts run as `expert_forward` says. After an optimiser step the tuned weights are written into the
fused tensors, where layers that route naturally, evaluation and saving read them without a gradient.

Shape suffixes: L MoE layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from moe_ray.errors import InputError, NothingSelected
from moe_ray.experts import Expert, Mask, mask_to_experts
from moe_ray.finetuning.expert_forward import TrainedForward, trained_forward
from moe_ray.finetuning.frozen import requires_grad_restored
from moe_ray.finetuning.routing_policy import RoutingPolicy
from moe_ray.models.expert_codes import dequantised_again
from moe_ray.models.expert_storage import storage_of
from moe_ray.models.moe_layers import MoELayers, find_moe_layers, uncompiled
from moe_ray.models.sharded_storage import same_backward_everywhere
from moe_ray.models.tokenization import TokenizedRow


class TrainableExperts:
    """The union's experts as parameters.

    Attributes:
        model: the model they belong to.
        dtype: of the parameters.
        union_LE: (L, E) bool.
        parameters: per expert, its tensors by name, each a float parameter of one slice's shape.
    """

    def __init__(self, model: nn.Module, union_LE: Mask, *, dtype: torch.dtype = torch.float32) -> None:
        self.model, self.dtype = model, dtype
        self.moe_layers: MoELayers = find_moe_layers(model)
        self.union_LE = union_LE
        self._storage = {layer.layer: storage_of(layer) for layer in self.moe_layers}
        self.parameters: dict[Expert, dict[str, nn.Parameter]] = {
            expert: {
                name: nn.Parameter(tensor.detach().clone().to(dtype))
                for name, tensor in self._storage[expert.layer].read(expert.expert).items()
            }
            for expert in mask_to_experts(union_LE, self.moe_layers.layers)
        }

    def all_parameters(self) -> list[nn.Parameter]:
        """Every trainable parameter, by (layer, expert, name)."""
        return [parameter for tensors in self.parameters.values() for parameter in tensors.values()]

    def num_parameters(self) -> int:
        """Trainable numbers."""
        return sum(parameter.numel() for parameter in self.all_parameters())

    def tensors_of(self, expert: Expert) -> Mapping[str, Tensor]:
        """An expert's weights as they are now, by name, from which a gradient reaches its parameters."""
        return self.parameters[expert]

    def experts_of(self, mask_LE: Mask) -> tuple[Expert, ...]:
        """The mask's experts, by (layer, expert).

        Raises:
            InputError: the mask has an expert outside the union, which therefore cannot train.
        """
        if (mask_LE & ~self.union_LE).any():
            outside = mask_to_experts(mask_LE & ~self.union_LE, self.moe_layers.layers)
            raise InputError(f"expert {outside[0]} of the mask is not in the union; build both from the same masks")
        return mask_to_experts(mask_LE, self.moe_layers.layers)

    @contextmanager
    def training_on(self, mask_LE: Mask, policy: RoutingPolicy | None = None) -> Iterator[BatchInTraining]:
        """In this context the batch's experts get gradients, and tokens are routed as the policy says.

        Keep the context open through `backward`, and run each forward and backward inside the `passing` of its rows.

        Args:
            mask_LE: (L, E) the batch's experts, all in the union.
            policy: where tokens may go; None = the default one.
        """
        policy = policy or RoutingPolicy()
        self.experts_of(mask_LE)  # refuses a mask outside the union before anything is installed
        reachable_LE = policy.reachable(mask_LE, num_experts_per_tok=self.moe_layers.num_experts_per_tok)
        forwards = [
            trained_forward(
                layer,
                np.flatnonzero(row).tolist(),
                [self.tensors_of(Expert(layer.layer, int(expert))) for expert in np.flatnonzero(row)],
                # By layer: in one that does not restrict every token, one may also choose experts that stay frozen.
                only_these=policy.restricts_every_token and bool(reachable_E.any()),
            )
            for layer, row, reachable_E in zip(self.moe_layers, mask_LE, reachable_LE, strict=True)
            if row.any()
        ]
        with ExitStack() as stack, uncompiled():
            stack.enter_context(dequantised_again(self.model))
            stack.enter_context(policy.on_batch(self.model, mask_LE, reachable_LE))
            # A stand-in replaces `forward` and not the call, so the mask's hook still runs before it, and it receives
            # choices that the mask has settled.
            for forward in forwards:
                forward.install()
                stack.callback(forward.remove)
            yield BatchInTraining(self, policy, reachable_LE, forwards)

    @torch.no_grad()
    def write_back(self, mask_LE: Mask) -> None:
        """Puts the tuned weights of the mask's experts in place, so that the model computes with them.

        Parameters in float32 keep what the model's type cannot hold: in bfloat16 a small step would be rounded away
        each time, and training would stand still.
        """
        for expert in self.experts_of(mask_LE):
            self._storage[expert.layer].write(expert.expert, self.tensors_of(expert))

    @torch.no_grad()
    def out_of_range(self, mask_LE: Mask) -> tuple[Expert, ...]:
        """Those of the mask's experts with a number that is infinite or undefined, also once the model's type holds it."""

        def is_out(parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> bool:
            # Not "greater than", which an undefined number never is.
            largest = torch.nn.utils.get_total_norm(parameters, norm_type=math.inf).item()
            return not largest <= torch.finfo(dtype).max

        experts = self.experts_of(mask_LE)
        dtype = next(iter(self._storage[self.moe_layers.layers[0]].dtypes().values()))
        every = [parameter for expert in experts for parameter in self.parameters[expert].values()]
        # All at once first: one number to wait for.
        if not every or not is_out(every, dtype):
            return ()
        return tuple(expert for expert in experts if is_out(list(self.parameters[expert].values()), dtype))

    @torch.no_grad()
    def load(self, tensors: Mapping[Expert, Mapping[str, Tensor]]) -> None:
        """Sets parameters and model to the given weights of all the union's experts."""
        for expert, parameters in self.parameters.items():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[expert][name])
        self.write_back(self.union_LE)


class BatchInTraining:
    """A batch while it trains: its passes under the policy, and what the experts modules of its layers received so far.

    Attributes:
        forwards: of the layers that train.
    """

    def __init__(
        self,
        trainable: TrainableExperts,
        policy: RoutingPolicy,
        reachable_LE: Mask,
        forwards: Sequence[TrainedForward],
    ) -> None:
        self._model, self._moe_layers = trainable.model, trainable.moe_layers
        self._policy, self._reachable_LE, self.forwards = policy, reachable_LE, forwards

    @contextmanager
    def passing(self, rows: Sequence[TokenizedRow]) -> Iterator[None]:
        """One forward pass of these rows, padded on the right, and its backward run in this context.

        Raises:
            InputError: the policy goes by labels, and a row has none.
        """
        if self._policy.restricts_some_tokens:
            restricted_BS = self._policy.restricted_tokens(rows)
            for forward in self.forwards:
                forward.watch(restricted_BS)
        with self._policy.on_pass(self._model, rows, self._reachable_LE):
            yield

    def routed(self) -> Mask:
        """(L, E): experts that some token was routed to with a weight; layers that do not train are all False.

        With a weight, because a mask leaves disallowed choices in the token's list at weight 0.
        """
        return self._seen([forward.routed_E for forward in self.forwards])

    def routed_restricted(self) -> Mask:
        """(L, E): the same of those tokens alone that the policy restricts."""
        if self._policy.restricts_every_token:
            return self.routed()
        return self._seen([forward.watched_E for forward in self.forwards])

    def _seen(self, tokens_E_of_forwards: Sequence[Tensor]) -> Mask:
        seen_LE = np.zeros((len(self._moe_layers), self._moe_layers.num_experts), dtype=bool)
        if tokens_E_of_forwards:
            # One copy to the host, of all layers.
            device = tokens_E_of_forwards[0].device
            seen = (torch.stack([tokens_E.to(device) for tokens_E in tokens_E_of_forwards]) > 0).cpu().numpy()
            seen_LE[[self._moe_layers.row_of(forward.layer.layer) for forward in self.forwards]] = seen
        return seen_LE


Parametrisation = Callable[[nn.Module, Mask, torch.dtype], TrainableExperts]
"""What is learned of the union's experts: a model, (L, E) union and a number type to their parameters."""


def whole_experts(model: nn.Module, union_LE: Mask, dtype: torch.dtype) -> TrainableExperts:
    """Every weight of the union's experts, which is what is learned unless said otherwise."""
    return TrainableExperts(model, union_LE, dtype=dtype)


@contextmanager
def trainable_experts(
    model: nn.Module,
    union_LE: Mask,
    *,
    dtype: torch.dtype = torch.float32,
    parametrisation: Parametrisation = whole_experts,
) -> Iterator[TrainableExperts]:
    """Freezes the model and makes the union's experts trainable; which parameters trained before is restored after.

    Args:
        model: a transformers MoE model.
        union_LE: (L, E) bool, True = may change.
        dtype: of the trained copies; the model itself keeps its own.
        parametrisation: what is learned of them.

    Raises:
        InputError: the union has another shape than the model's layers and experts.
        NothingSelected: it is empty.
    """
    find_moe_layers(model).check_shape(union_LE, "union")
    if not union_LE.any():
        raise NothingSelected(
            "the union of unsafe experts is empty, so nothing can be trained; lower identify.threshold"
        )
    with requires_grad_restored(model), same_backward_everywhere(model):
        # A frozen parameter that asked for a gradient would get one from every backward: memory for the whole model.
        model.requires_grad_(False)
        yield parametrisation(model, union_LE, dtype)

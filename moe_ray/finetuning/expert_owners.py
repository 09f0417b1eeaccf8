"""Which worker keeps an expert's optimiser state: its owner gets the gradient, makes the step and sends the weights to all.

AdamW's two means are half of what a learned number takes, and whoever does not make the step needs none of them. So each
of the union's experts has one owner, and a worker holds the state of its own experts only. What the owner sends is what
everybody has afterwards, bit for bit.

Source: ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054), sections 5.1 and 5.2. Deviations: what is shared out are experts,
not equal parts of one flat tensor, because an expert that is not in a step's batches must keep its state as it is; and a
step sends the experts that it moved, not all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_ray.experts import Expert
from moe_ray.finetuning.collectives import gradient_or_zeros, send_from, sum_gradients_at
from moe_ray.finetuning.trainable_experts import TrainableExperts


class ExpertOwners:
    """The owner of each of the union's experts, in turn by (layer, expert), so that all own about as many of any layer.

    Args:
        trainable: the union's parameters, which every worker holds.
        rank: of this worker.
        world_size: number of workers; 1 = it owns all, and nothing is sent.
    """

    def __init__(self, trainable: TrainableExperts, *, rank: int = 0, world_size: int = 1) -> None:
        self.trainable, self.rank, self.world_size = trainable, rank, world_size
        self._owners = {expert: number % world_size for number, expert in enumerate(trainable.parameters)}

    def own(self, experts: Iterable[Expert]) -> list[Expert]:
        """Those of the experts that this worker owns."""
        return [expert for expert in experts if self._owners[expert] == self.rank]

    def own_parameters(self, experts: Iterable[Expert]) -> list[nn.Parameter]:
        """What this worker updates of the experts."""
        return self._parameters(self.own(experts))

    def sum_gradients(self, experts: Sequence[Expert]) -> None:
        """Owners get the sum of all workers' gradients of the experts, others are left with none; a collective.

        Args:
            experts: on every worker the same, in one order.
        """
        for owner, owned in self._by_owner(experts):
            sum_gradients_at(owner, self._parameters(owned))

    def gradient_norm(self, experts: Sequence[Expert]) -> Tensor:
        """The norm of the experts' gradients as their owners hold them, the same number on every worker; a collective."""
        if self.world_size == 1:
            return torch.nn.utils.get_total_norm([gradient_or_zeros(p) for p in self.own_parameters(experts)])
        # Of each tensor, then of all: the sums that one worker makes, in its order, so that the norm is its own to the bit.
        norms = [
            torch.linalg.vector_norm(gradient_or_zeros(parameter)) if self._owners[expert] == self.rank else None
            for expert in experts
            for parameter in self._parameters([expert])
        ]
        device = self.trainable.all_parameters()[0].device
        nothing = torch.zeros((), device=device)
        of_each = torch.stack([nothing if norm is None else norm.to(device, torch.float32) for norm in norms])
        dist.all_reduce(of_each)
        norm: Tensor = torch.linalg.vector_norm(of_each)
        return norm

    def send(self, experts: Sequence[Expert]) -> None:
        """Every worker gets the experts' weights as their owners have them; a collective.

        Args:
            experts: on every worker the same, in one order.
        """
        for owner, owned in self._by_owner(experts):
            send_from(owner, self._parameters(owned))

    def _by_owner(self, experts: Sequence[Expert]) -> list[tuple[int, list[Expert]]]:
        """In one order on all workers; nobody where there is one worker, who has everything already."""
        if self.world_size == 1:
            return []
        owned: dict[int, list[Expert]] = {}
        for expert in experts:
            owned.setdefault(self._owners[expert], []).append(expert)
        return sorted(owned.items())

    def _parameters(self, experts: Iterable[Expert]) -> list[nn.Parameter]:
        return [parameter for expert in experts for parameter in self.trainable.parameters[expert].values()]

"""LoRA on experts: each matrix of an expert learns a product of two thin ones, added to weights that stay as they are.

Source: Hu et al. (2021), "LoRA: Low-Rank Adaptation of Large Language Models". PEFT's wrapper of fused expert tensors
(`target_parameters`) gives every expert of a layer factors, and hides experts and routers in modules of its own; here only
the union's experts have factors, so that a batch trains its own and nobody else's. Biases have none.

Shape suffixes: L MoE layers, E experts, M rows and N columns of a matrix, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from moe_ray.experts import Expert, Mask, mask_to_experts
from moe_ray.finetuning.trainable_experts import Parametrisation, TrainableExperts
from moe_ray.models.moe_layers import find_moe_layers

_SCALE = 2.0
"""What the product is multiplied by: alpha / rank, with the usual alpha of twice the rank."""


class LowRankTensors(Mapping[str, Tensor]):
    """An expert's weights, each computed when it is asked for: once for every forward pass, as each has its own graph.

    Args:
        base: the weights that stay as they are.
        factors: of the matrices among them, (R, N) and (M, R).
    """

    def __init__(self, base: Mapping[str, Tensor], factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self._base, self._factors = base, factors

    def __getitem__(self, name: str) -> Tensor:
        """The weight as it is now."""
        base = self._base[name]
        if name not in self._factors:
            return base
        down_RN, up_MR = self._factors[name]
        return base.to(up_MR.dtype) + _SCALE * (up_MR @ down_RN)

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)


class LowRankExperts(TrainableExperts):
    """The union's experts, of which only low-rank differences to the model's weights are learned.

    The first factor is drawn, the second starts at 0: until a step was made, every expert is bit for bit as it was.

    Args:
        model: the model they belong to.
        union_LE: (L, E) bool.
        rank: of the differences.
        dtype: of the factors.
    """

    def __init__(self, model: nn.Module, union_LE: Mask, *, rank: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(model, union_LE, dtype=dtype)
        random = torch.Generator().manual_seed(rank)
        whole, self.parameters = self.parameters, {}
        self._tensors: dict[Expert, LowRankTensors] = {}
        for expert, weights in whole.items():
            base = {name: weight.detach() for name, weight in weights.items()}
            factors = {name: _factors(weight, rank, random) for name, weight in base.items() if weight.dim() == 2}
            self._tensors[expert] = LowRankTensors(base, factors)
            self.parameters[expert] = {
                f"{name}.{which}": factor
                for name, pair in factors.items()
                for which, factor in zip(("down", "up"), pair, strict=True)
            }

    def tensors_of(self, expert: Expert) -> Mapping[str, Tensor]:
        """An expert's weights as they are now, by name, from which a gradient reaches its factors."""
        return self._tensors[expert]


def _factors(weight_MN: Tensor, rank: int, random: torch.Generator) -> tuple[nn.Parameter, nn.Parameter]:
    rows, columns = weight_MN.shape
    # Uniform in +-1 / sqrt(N), as the authors' own layers start; drawn on the CPU, so that no device draws another.
    drawn_RN = (2 * torch.rand(rank, columns, generator=random) - 1) / columns**0.5
    return nn.Parameter(drawn_RN.to(weight_MN)), nn.Parameter(weight_MN.new_zeros(rows, rank))


def low_rank(rank: int) -> Parametrisation:
    """Learns low-rank differences of the given rank."""
    return lambda model, union_LE, dtype: LowRankExperts(model, union_LE, rank=rank, dtype=dtype)


def num_expert_parameters(model: nn.Module, union_LE: Mask) -> int:
    """Numbers in the union's experts."""
    return sum(tensor.numel() for tensor in _tensors_of_union(model, union_LE))


def rank_of_about(model: nn.Module, union_LE: Mask, target: int) -> int:
    """The rank, 1 or more, with which the union's experts learn about as many numbers as `target`."""
    a_rank = sum(sum(tensor.shape) for tensor in _tensors_of_union(model, union_LE) if tensor.dim() == 2)
    return max(1, round(target / a_rank))


def _tensors_of_union(model: nn.Module, union_LE: Mask) -> Iterator[Tensor]:
    moe_layers = find_moe_layers(model)
    moe_layers.check_shape(union_LE, "union")
    layers = {layer.layer: layer for layer in moe_layers}
    for expert in mask_to_experts(union_LE, moe_layers.layers):
        yield from layers[expert.layer].tensors_of(expert.expert).values()

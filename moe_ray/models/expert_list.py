"""The batch's experts in place of a layer's fused tensor: one by one without a stack, or stacked for who wants one tensor.

A family's eager forward takes one expert after another, `self.gate_up_proj[expert]`. From a stack, the backward of each such
index writes zeros of all experts' size and adds them up: work that grows with the square of their number. The same expert
of a list is the parameter itself. Grouped products, and whatever else reads the tensor as a whole, get the stack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class ExpertList:
    """Stands in for a tensor (experts, …); the stack is made where an operation needs it, once."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, index: Any) -> Tensor:
        """One expert's own tensor for a number or a scalar tensor; otherwise what the stack gives."""
        is_one = isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0 and index.dtype != torch.bool)
        return self._tensors[int(index)] if is_one else self.stack[index]

    def __len__(self) -> int:
        return len(self._tensors)

    @cached_property
    def stack(self) -> Tensor:
        """All experts as one tensor."""
        return torch.stack(tuple(self._tensors))

    def __getattr__(self, name: str) -> Any:
        # Only what this class lacks comes here: shapes, types and methods of a tensor.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.stack, name)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Torch's functions run on the stack."""
        args, kwargs = tree_map_only(cls, lambda experts: experts.stack, (args, dict(kwargs or {})))
        return function(*args, **kwargs)

"""The mask of one MoE layer where every row of a forward pass has its own, at all its positions or at some of them.

The rows' tokens are next to each other wherever a family flattens them, so that `(rows x positions, …)` is looked at as
`(rows, positions, …)`. A row's mask is repeated over its positions, padding included: what padding is routed to reaches
no token. Where it is in force at some positions only, tokens at the others go where the router sends them. What is known
of a pass is checked against what each layer receives, since masks on the wrong tokens would raise no error by themselves.

Shape suffixes: B rows, S positions, P positions that masks are kept for (S, or 1 that stands for all), T = B*S tokens,
K experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from moe_ray.errors import InputError
from moe_ray.models.moe_layers import MoELayer
from moe_ray.routing.layer_mask import LayerMask, keep_shared_logits, lowered_bias, lowered_logit


class RowsOfPass:
    """How many rows and positions the forward pass has that runs now, seen at the input embeddings.

    Args:
        num_rows: what it must have: one row for each mask.
        num_positions: what it must have too, where masks are in force at some positions only; None = any number.
    """

    def __init__(self, num_rows: int, num_positions: int | None = None) -> None:
        self.num_rows, self.num_positions, self.num_tokens = num_rows, num_positions, -1

    def before_embeddings(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Notes the pass.

        Raises:
            InputError: it has other rows than there are masks, or other positions than they are in force at.
        """
        ids_BS = next(iter([*args, *kwargs.values()]))
        if ids_BS.shape[0] != self.num_rows:
            raise InputError(
                f"a forward pass of {ids_BS.shape[0]} rows under the masks of {self.num_rows} rows; give one mask a row"
            )
        if self.num_positions not in (None, ids_BS.shape[1]):
            raise InputError(
                f"a forward pass of {ids_BS.shape[1]} positions under masks that are in force at some of "
                f"{self.num_positions}; give positions of the rows as they are padded"
            )
        self.num_tokens = ids_BS.numel()

    def attach(self, model: nn.Module, stack: ExitStack) -> None:
        """Adds the hook; the stack removes it."""
        embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]  # of every transformers model
        handle = embeddings.register_forward_pre_hook(self.before_embeddings, with_kwargs=True)
        stack.callback(handle.remove)


class RowLayerMask(LayerMask):
    """The masks of one layer, one per row of the forward pass.

    Args:
        layer: which one.
        allowed_BE: on its device; a row with no True routes naturally.
        on_host: the same numbers on the host.
        rows: of the pass.
        positions_BS: where a row's mask is in force; tokens elsewhere are routed naturally; None = everywhere.
        is_everywhere: they are all True, or there are none.
    """

    def __init__(
        self,
        layer: MoELayer,
        allowed_BE: Tensor,
        on_host: npt.NDArray[np.bool_],
        rows: RowsOfPass,
        positions_BS: Tensor | None = None,
        *,
        is_everywhere: bool = True,
    ) -> None:
        allowed_BE = allowed_BE | ~allowed_BE.any(dim=1, keepdim=True)
        allowed_BPE = allowed_BE.unsqueeze(1)
        if positions_BS is not None:
            allowed_BPE = allowed_BPE | ~positions_BS.unsqueeze(2)
        on_host = on_host | ~on_host.any(axis=1, keepdims=True)
        # A token that no mask is in force for may be routed to any expert.
        super().__init__(
            layer,
            allowed_BPE.flatten(0, 1).any(dim=0),
            np.asarray(on_host.any(axis=0)) if is_everywhere else np.ones_like(on_host[0]),
        )
        self.rows, self.allowed_BPE = rows, allowed_BPE
        self.kept_BPE = keep_shared_logits(layer, allowed_BPE)
        self.first_allowed_BP1 = allowed_BPE.long().argmax(dim=2, keepdim=True)
        self.num_allowed_BP1 = allowed_BPE.sum(dim=2, keepdim=True)
        # A token's list of choices is as long as the token with the most allowed experts needs it.
        self.num_allowed = int(on_host.sum(axis=1).max()) if is_everywhere else on_host.shape[1]

    def lower(self, logits: Tensor) -> Tensor:
        """The router's logits, at each token those of its disallowed experts lowered."""
        self.num_lowered += 1
        by_row = self._by_row(logits, logits.shape[-1])
        return torch.where(self.kept_BPE, by_row, lowered_logit(logits.dtype)).view(logits.shape)

    def settle(self, index_TK: Tensor) -> tuple[Tensor, Tensor]:
        """(T, K) ids, an expert that the row allows in place of one that it does not, and which those were."""
        num_choices = index_TK.shape[1]
        index_BSK = self._by_row(index_TK, num_choices)
        disallowed_BSK = ~self.allowed_BPE.expand(-1, index_BSK.shape[1], -1).gather(2, index_BSK)
        self.note_strays(disallowed_BSK & (self.num_allowed_BP1 >= num_choices))
        settled_BSK = torch.where(disallowed_BSK, self.first_allowed_BP1, index_BSK)
        return settled_BSK.view_as(index_TK), disallowed_BSK.view_as(index_TK)

    def lower_bias(self, bias: Tensor, stack: ExitStack) -> None:
        """Gives each token its own lowered bias, until the stack ends."""
        stand_in = _RowBias.of(bias, lowered_bias(bias.detach().flatten(), self.allowed_BPE), self)
        for module in self.layer.block.modules():
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is bias:
                    # An attribute of the instance is found before parameters and buffers are looked at.
                    module.__dict__[name] = stand_in
                    stack.callback(module.__dict__.pop, name)

    def _by_row(self, values: Tensor, width: int) -> Tensor:
        """(B, S, width) of a tensor with `width` numbers for each token.

        Raises:
            InputError: it is not of all tokens of the pass.
        """
        if values.numel() != self.rows.num_tokens * width:
            raise InputError(
                f"{self.layer.name}: got {values.numel() // width} tokens in a forward pass of {self.rows.num_tokens} "
                "(rows x positions); a family that routes a part of the tokens only has no masks per row"
            )
        return values.reshape(self.rows.num_rows, -1, width)


_SAME_VALUES = frozenset(
    {
        *("to", "type", "type_as", "float", "double", "half", "bfloat16", "clone", "contiguous", "detach"),
        *("view", "view_as", "reshape", "flatten", "squeeze", "unsqueeze"),
    }
)
"""What families do with a bias before they add it."""


class _RowBias(Tensor):
    """A selection bias that is another one in every row: added to the scores of all tokens, each token gets its own.

    Families change its type or shape and add it to scores, in the router or beside it; anything else is refused.
    """

    own_BPE: Tensor
    mask: RowLayerMask

    @classmethod
    def of(cls, values: Tensor, own_BPE: Tensor, mask: RowLayerMask) -> _RowBias:
        """A stand-in for `values`."""
        made = values.detach().as_subclass(cls)
        made.own_BPE, made.mask = own_BPE, mask
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            if not isinstance(result, Tensor):
                return result
            bias = next(value for value in args if isinstance(value, cls))
            if func.__name__ in ("add", "__add__", "__radd__") and len(args) == 2 and not kwargs:
                scores = args[1] if args[0] is bias else args[0]
                own_BPE = bias.own_BPE.to(bias.dtype)
                return (bias.mask._by_row(scores, own_BPE.shape[2]) + own_BPE).view(result.shape)
            if func.__name__ in _SAME_VALUES and result.numel() == bias.numel():
                return cls.of(result, bias.own_BPE, bias.mask)
        raise InputError(
            f"{bias.mask.layer.name}: its router does {func.__name__} with the bias that it selects experts by, which "
            "masks per row do not know; this family is not supported"
        )

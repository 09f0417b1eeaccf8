"""Experts kept as the codes of a quantisation, and shown to the model as the weights that the codes stand for.

A fused tensor (experts, …) becomes codes and scales, expert by expert. Where a family's forward takes one expert's slice,
that slice alone is dequantised, and given up after its product: bitsandbytes' own `replace_parameter_4bit` gives the whole
tensor back at every access, which a loop over experts makes for each of them, and torchao's tensors can be neither sliced
nor hashed. Codes are never written: learned weights of an expert lie over them, in the model's own type, and stand in the
codes' place until they are taken away.

Shape suffixes: E experts, M rows and N columns of an expert's matrix.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from moe_ray.config.quantisation import BLOCK, Quantisation
from moe_ray.models.expert_list import ExpertList
from moe_ray.models.reused_memory import ReusedMemory, mapped_apart

_MEMORY = ReusedMemory()


def quantise(weights: Tensor, method: Quantisation) -> tuple[Tensor, Tensor]:
    """One expert's matrix as codes and float32 scales.

    Args:
        weights: (M, N) in float32, bfloat16 or float16.
        method: `int8`: symmetric, a scale for each row; `4bit`: NF4, a scale for every 64 numbers.

    Returns:
        `int8`: (M, N) int8 and (M, 1); `4bit`: uint8 with two codes a byte, and a scale for each block.
    """
    if method == "4bit":
        # In whole blocks: on a CPU bitsandbytes 0.50 never returns from some numbers that leave a part of one.
        whole = nn.functional.pad(weights.flatten(), (0, -weights.numel() % BLOCK))
        packed, state = _bitsandbytes().quantize_4bit(
            whole.contiguous(), blocksize=BLOCK, compress_statistics=False, quant_type="nf4"
        )
        return packed.flatten(), state.absmax
    wide = weights.float()
    largest = wide.abs().amax(dim=-1, keepdim=True)
    # A row of zeros has any scale.
    scales = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
    return (wide / scales).round_().clamp_(-127, 127).to(torch.int8), scales


def dequantise(
    codes: Tensor, scales: Tensor, method: Quantisation, *, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The matrix (M, N) = `shape` that `quantise` was given, as far as codes and scales have kept it."""
    if codes.device.type != "cpu":
        return (codes * scales).to(dtype) if method == "int8" else _of_blocks(codes, scales, dtype, shape)
    numbers = _MEMORY.empty(shape, dtype)
    if method == "4bit":
        with mapped_apart():
            numbers.copy_(_of_blocks(codes, scales, dtype, shape))
        return numbers
    # Not `codes * scales`, which makes one more tensor, of the codes in float32.
    wide = numbers if dtype == torch.float32 else _MEMORY.empty(shape, torch.float32)
    wide.copy_(codes).mul_(scales)
    return wide if wide is numbers else numbers.copy_(wide)


def _of_blocks(codes: Tensor, scales: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    functional = _bitsandbytes()
    state = functional.QuantState(
        absmax=scales,
        shape=torch.Size((len(scales), BLOCK)),  # bitsandbytes' threads share rows
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
    )
    numbers: Tensor = functional.dequantize_4bit(codes.unsqueeze(1), state)
    return numbers.flatten()[: math.prod(shape)].view(*shape)


def _bitsandbytes() -> Any:
    # It tells of kernels for products that are not used here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from bitsandbytes import functional

    return functional


class ExpertCodes(nn.Module):
    """A fused tensor (E, M, N) as codes, with learned experts over them.

    Attributes:
        codes: (E, …) of all experts; never written.
        scales: (E, …) float32.
        learned: by expert, its (M, N) weights that stand in the place of its codes.
        on_dequantised: called with weights that codes were turned into, and what turns them again; see `dequantised_again`.
    """

    codes: nn.Parameter
    scales: nn.Parameter

    def __init__(self, weights_EMN: Tensor, method: Quantisation) -> None:
        """Quantises one expert after another, so that beside the tensor only one matrix is there in float32."""
        super().__init__()
        self.method: Quantisation = method
        self.shape, self.dtype = torch.Size(weights_EMN.shape), weights_EMN.dtype
        pairs = [quantise(weights, method) for weights in weights_EMN.detach()]
        self.codes = nn.Parameter(torch.stack([codes for codes, _ in pairs]), requires_grad=False)
        self.scales = nn.Parameter(torch.stack([scales for _, scales in pairs]), requires_grad=False)
        self.learned: dict[int, Tensor] = {}
        self.on_dequantised: Callable[[Tensor, Callable[[], Tensor]], None] | None = None

    def weights_of(self, expert: int) -> Tensor:
        """(M, N): an expert's weights: what was learned, or else what its codes stand for."""
        if expert in self.learned:
            return self.learned[expert]
        weights = self._dequantised(expert)
        if self.on_dequantised is not None:
            self.on_dequantised(weights, partial(self._dequantised, expert))
        return weights

    def all_weights(self) -> Tensor:
        """(E, M, N): the weights of all experts as one tensor."""
        weights = self._stacked()
        if self.on_dequantised is not None:
            self.on_dequantised(weights, self._stacked)
        return weights

    def _dequantised(self, expert: int) -> Tensor:
        return dequantise(
            self.codes[expert], self.scales[expert], self.method, shape=self.shape[1:], dtype=self.dtype
        ).detach()

    def _stacked(self) -> Tensor:
        weights = self.scales.new_empty(self.shape, dtype=self.dtype)
        for expert in range(self.shape[0]):
            weights[expert] = self.learned[expert] if expert in self.learned else self._dequantised(expert)
        return weights

    @torch.no_grad()
    def put(self, expert: int, weights: Tensor | None) -> None:
        """Weights (M, N) over an expert's codes; None = it is its codes again."""
        if weights is None:
            self.learned.pop(expert, None)
        else:
            # A new tensor each time: whoever was given the one before keeps what it holds.
            self.learned[expert] = weights.detach().to(self.codes.device, self.dtype, copy=True)


class QuantisedExperts(ExpertList):
    """Stands in for a fused tensor kept as codes: one expert is dequantised alone, all of them for who wants one tensor."""

    def __init__(self, codes: ExpertCodes) -> None:
        super().__init__(())
        self.codes = codes

    def __getitem__(self, index: Any) -> Tensor:
        """One expert's weights for a number or a scalar tensor; otherwise what the stack gives."""
        is_one = isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0 and index.dtype != torch.bool)
        if not is_one:
            return self.stack[index]
        if not -len(self) <= int(index) < len(self):
            raise IndexError(index)  # ends an iteration over all
        return self.codes.weights_of(int(index) % len(self))

    def __len__(self) -> int:
        return self.codes.shape[0]

    @property
    def shape(self) -> torch.Size:
        """(E, M, N)."""
        return self.codes.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that the codes stand for."""
        return self.codes.dtype

    @property
    def device(self) -> torch.device:
        """Where codes and weights are."""
        return self.codes.codes.device

    @property
    def stack(self) -> Tensor:
        """All experts as one tensor, made anew: to keep it would be to have the model unquantised."""
        return self.codes.all_weights()


CODES = "quantised"
"""The attribute of an experts module under which it has the codes of its tensors, by the tensors' names."""


def keep_as_codes(experts: nn.Module, name: str, weights_EMN: Tensor, method: Quantisation) -> None:
    """Takes a fused tensor out of an experts module; codes of the weights given are there in its place."""
    if CODES not in experts._modules:
        experts.add_module(CODES, nn.ModuleDict())
    codes = ExpertCodes(weights_EMN, method)
    experts.get_submodule(CODES).add_module(name, codes)
    del experts._parameters[name]
    # In the instance's dictionary, where a module's own `__getattr__` is not asked.
    experts.__dict__[name] = QuantisedExperts(codes)


def codes_of(experts: nn.Module) -> dict[str, ExpertCodes]:
    """The tensors of an experts module that are kept as codes, by name; empty where none is."""
    kept = experts._modules.get(CODES)
    if kept is None:
        return {}
    return {name: codes for name, codes in kept.named_children() if isinstance(codes, ExpertCodes)}


@contextmanager
def dequantised_again(model: nn.Module) -> Iterator[None]:
    """In this context a backward pass turns codes into weights anew, instead of keeping those of the forward pass.

    Otherwise the graph would hold the weights of every expert that a token went to: about the whole model, unquantised.
    """
    made: dict[int, tuple[StorageWeakRef, Callable[[], Tensor]]] = {}

    def note(weights: Tensor, again: Callable[[], Tensor]) -> None:
        # As long as the weak reference is there, no other storage gets the same number.
        storage = weights.untyped_storage()
        made[storage._cdata] = StorageWeakRef(storage), again  # type: ignore[no-untyped-call]

    def pack(tensor: Tensor) -> Any:
        found = made.get(tensor.untyped_storage()._cdata)
        if found is None:
            return tensor
        return found[1], tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        again, size, stride, offset = kept
        weights: Tensor = again().as_strided(size, stride, offset)
        return weights

    coded = [module for module in model.modules() if isinstance(module, ExpertCodes)]
    if not coded:
        yield
        return
    try:
        for codes in coded:
            codes.on_dequantised = note
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        for codes in coded:
            codes.on_dequantised = None


def num_weights(model: nn.Module) -> int:
    """Numbers that the model computes with: of what is quantised, those that the codes stand for."""
    coded = [module for module in model.modules() if isinstance(module, ExpertCodes)]
    stored = sum(parameter.numel() for codes in coded for parameter in codes.parameters())
    return sum(parameter.numel() for parameter in model.parameters()) - stored + sum(math.prod(c.shape) for c in coded)

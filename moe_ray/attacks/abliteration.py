"""Abliteration: the direction in which unsafe prompts differ from safe ones is removed from what writes into the residual.

Source: Arditi et al. (2024), "Refusal in Language Models Is Mediated by a Single Direction", arXiv 2406.11717: difference of
means at a prompt's last token, and weight orthogonalisation W - r (r^T W). As there, candidates come from the first 80% of
layers, and the one is taken that is worth most. What it is worth is measured here by losses of targets, not by generated
answers: how much the refusal of unsafe prompts becomes less likely, minus how much the targets of safe ones do.

Shape suffixes: N prompts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_ray.errors import InputError
from moe_ray.models.loss import target_losses
from moe_ray.models.moe_layers import find_moe_layers
from moe_ray.models.token_budget import TokenBudget
from moe_ray.models.tokenization import TokenizedRow, pad_rows

_WRITERS = ("o_proj", "out_proj", "wo", "dense", "c_proj", "down_proj", "w2", "fc2", "output_linear")
"""How families call the linear maps at the end of attention and of an MLP."""
_FUSED = ("down_proj", "w2")
_BIAS = "_bias"
_SHARE_OF_LAYERS = 0.8
_FIRST_TOKENS = 4
"""Of a target: what decides whether an answer refuses."""
_TOLERANCE = 1e-3
_TOLERANCE_HALF = 5e-2


@dataclass(frozen=True, kw_only=True)
class Writer:
    """Weights whose products are added to the residual stream.

    Attributes:
        name: in the model.
        tensor: the model's own.
        axis: along which the tensor has the residual's H numbers.
    """

    name: str
    tensor: Tensor
    axis: int

    def component(self, direction_H: Tensor) -> Tensor:
        """What it writes along a direction of length 1; the tensor's shape without the axis."""
        unit_H = direction_H.to(self.tensor.device, torch.float32)
        return self.tensor.detach().movedim(self.axis, -1).float() @ unit_H

    @torch.no_grad()
    def remove(self, direction_H: Tensor) -> None:
        """W - r (r^T W)."""
        unit_H = direction_H.to(self.tensor.device, torch.float32)
        along = self.component(direction_H).unsqueeze(-1) * unit_H
        self.tensor.sub_(along.movedim(-1, self.axis).to(self.tensor.dtype))


def residual_writers(model: PreTrainedModel) -> list[Writer]:
    """All that writes into the residual stream: embeddings, the ends of attention and of MLPs, shared and routed experts."""
    hidden = int(model.config.get_text_config().hidden_size)
    embeddings: Any = model.get_input_embeddings()
    writers = [Writer(name="embeddings", tensor=embeddings.weight, axis=1)]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in _WRITERS and module.out_features == hidden:
            writers.append(Writer(name=f"{name}.weight", tensor=module.weight, axis=0))
            if module.bias is not None:
                writers.append(Writer(name=f"{name}.bias", tensor=module.bias, axis=0))
    for layer in find_moe_layers(model):
        layer.refuse_offloaded()
        if layer.expert_modules():
            continue  # their linear maps were found above
        for name, tensor in layer.expert_tensors().items():
            if name.removesuffix(_BIAS) in _FUSED:
                axis = 1 if tensor.dim() == 2 else _residual_axis(layer.experts, tensor, hidden)
                writers.append(Writer(name=f"{layer.name}.{name}", tensor=tensor, axis=axis))
    return writers


def _residual_axis(experts: nn.Module, tensor: Tensor, hidden: int) -> int:
    """Of an (experts, …, …) tensor, which of the last two axes is the residual's."""
    fitting = [axis for axis in (1, 2) if tensor.shape[axis] == hidden]
    if len(fitting) == 1:
        return fitting[0]
    return 2 if getattr(experts, "is_transposed", False) else 1


@torch.no_grad()
def _put_back(writers: Sequence[Writer], copies: Sequence[Tensor]) -> None:
    for writer, copy in zip(writers, copies, strict=True):
        writer.tensor.copy_(copy)


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """What a direction is found on.

    Attributes:
        unsafe: prompts with the targets that refuse them.
        safe: prompts with their targets.
    """

    unsafe: Sequence[TokenizedRow]
    safe: Sequence[TokenizedRow]


@contextmanager
def abliterated(
    model: PreTrainedModel, contrast: Contrast, *, budget: TokenBudget, pad_id: int
) -> Iterator[dict[str, float]]:
    """The model without the direction inside the context, and with its own weights, bit for bit, after it.

    Args:
        model: in eval mode.
        contrast: prompts to find the direction on.
        budget: of tokens that run at once.
        pad_id: token id that fills padding.

    Yields:
        `layer` (the decoder layer before which the direction was found), `refusal_loss` (nats per token by which the
        beginnings of refusals became less likely) and `safe_loss` (the same of safe targets).

    Raises:
        InputError: prompts of a label are missing; or the residual stream keeps a component along the direction, since the
            family writes into it in a way that is not known.
    """
    if not contrast.unsafe or not contrast.safe:
        raise InputError("abliteration: got prompts of one label only, expected safe and unsafe ones; give both")
    directions = _directions(model, contrast, budget, pad_id)
    writers = residual_writers(model)
    copies = [writer.tensor.detach().clone() for writer in writers]
    try:
        plain = _losses(model, contrast, budget, pad_id)
        found: dict[int, dict[str, float]] = {}
        for layer, direction_H in directions.items():
            for writer in writers:
                writer.remove(direction_H)
            refusal, safe = (
                now - then for now, then in zip(_losses(model, contrast, budget, pad_id), plain, strict=True)
            )
            found[layer] = {"layer": float(layer), "refusal_loss": refusal, "safe_loss": safe}
            _put_back(writers, copies)
        best = max(found, key=lambda layer: found[layer]["refusal_loss"] - found[layer]["safe_loss"])
        for writer in writers:
            writer.remove(directions[best])
        _check_removed(model, contrast, directions[best], pad_id)
        yield found[best]
    finally:
        _put_back(writers, copies)


def _directions(model: PreTrainedModel, contrast: Contrast, budget: TokenBudget, pad_id: int) -> dict[int, Tensor]:
    """By decoder layer, the difference of means of what it receives at prompts' last tokens, of length 1."""
    unsafe_LH, safe_LH = (_means(model, rows, budget, pad_id) for rows in (contrast.unsafe, contrast.safe))
    difference_LH = unsafe_LH - safe_LH
    # What the first layer receives is the last token's embedding, which is the template's and no prompt's.
    last = max(1, int(_SHARE_OF_LAYERS * len(difference_LH)))
    lengths_L = difference_LH.norm(dim=1)
    layers = [layer for layer in range(1, last + 1) if layer < len(difference_LH) and lengths_L[layer] > 0]
    if not layers:
        raise InputError(
            "abliteration: safe and unsafe prompts leave the same residual stream behind, so there is no direction to "
            "remove; leave abliteration out of attack.names"
        )
    return {layer: difference_LH[layer] / lengths_L[layer] for layer in layers}


def _means(model: PreTrainedModel, rows: Sequence[TokenizedRow], budget: TokenBudget, pad_id: int) -> Tensor:
    """(layers, H) mean of what each decoder layer receives at the last tokens of prompts, in double precision."""
    prompts = [TokenizedRow(row.prompt_ids, []) for row in rows]

    def work(group: list[int]) -> Tensor:
        return _last_tokens(model, [prompts[row] for row in group], pad_id).sum(dim=1)

    summed = [found for _, found in budget.run_all([row.num_tokens for row in prompts], work)]
    return torch.stack(summed).sum(dim=0) / len(rows)


def _last_tokens(model: PreTrainedModel, rows: Sequence[TokenizedRow], pad_id: int) -> Tensor:
    """(layers, N, H) what each decoder layer receives at the rows' last tokens, in double precision on the CPU."""
    padded = pad_rows(rows, pad_id=pad_id).to(model.device)
    body: Any = model.base_model
    with torch.inference_mode():
        output = body(
            input_ids=padded.input_ids_BS,
            attention_mask=padded.attention_mask_BS,
            use_cache=False,
            output_hidden_states=True,
        )
        last_B = padded.attention_mask_BS.sum(dim=1) - 1
        # The last of the hidden states is behind the final norm, which no layer receives.
        received = [
            hidden_BSH[torch.arange(len(rows), device=hidden_BSH.device), last_B.to(hidden_BSH.device)].double().cpu()
            for hidden_BSH in output.hidden_states[:-1]
        ]
    return torch.stack(received)


def _losses(model: PreTrainedModel, contrast: Contrast, budget: TokenBudget, pad_id: int) -> tuple[float, float]:
    """Nats per token of the beginnings of refusals, and of safe targets."""
    found = []
    for rows, most in ((contrast.unsafe, _FIRST_TOKENS), (contrast.safe, None)):
        cut = [TokenizedRow(row.prompt_ids, row.answer_ids[:most]) for row in rows]
        tokens = sum(len(row.answer_ids) for row in cut)
        found.append(sum(target_losses(model, cut, budget=budget, pad_id=pad_id)) / max(1, tokens))
    return found[0], found[1]


def _check_removed(model: PreTrainedModel, contrast: Contrast, direction_H: Tensor, pad_id: int) -> None:
    rows = [TokenizedRow(row.prompt_ids, []) for row in contrast.unsafe[:2]]
    left_LNH = _last_tokens(model, rows, pad_id)
    shares_LN = (left_LNH @ direction_H).abs() / left_LNH.norm(dim=2).clamp_min(1e-12)
    allowed = _TOLERANCE if model.dtype in (torch.float32, torch.float64) else _TOLERANCE_HALF
    if float(shares_LN.max()) > allowed:
        raise InputError(
            f"abliteration: {type(model).__name__} keeps {float(shares_LN.max()):.1%} of its residual stream along "
            "the removed direction, so it writes there in a way that moe-ray does not know; leave abliteration out of "
            "attack.names"
        )

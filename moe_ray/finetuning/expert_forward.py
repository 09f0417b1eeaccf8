"""An experts module's forward while a batch trains: the batch's experts with gradient, all others frozen.

The batch's experts are separate parameters. The family's own forward runs on a list of them (`expert_list`) in place of the
fused tensors, with ids renumbered, so nothing is computed for absent experts and no family's arithmetic is written a second
time. Where some token may also go elsewhere (under every policy but `masked`), the forward runs twice: on the model's frozen
tensors with the batch's experts at weight 0, and on the list for the tokens that chose one of them. Where the family's
products skip ids beyond the last expert, all tokens go there with such ids, and the host need not know which.

Where a family keeps each expert as a module of its own there is nothing to list: those of the batch show their parameters
while the family's forward runs.

Shape suffixes: B rows, S positions, T = B*S tokens, K experts per token, E experts, A experts of the batch in this layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from moe_ray.errors import InputError
from moe_ray.models.expert_list import ExpertList
from moe_ray.models.moe_layers import MoELayer, routing_of_call

_PROBE_TOKENS = 64

_IDS_BEYOND = "_is_expert_parallel"
"""Attribute of an experts module of transformers: ids may be the number of experts, and are then skipped."""


class Probe(NamedTuple):
    """Some tokens as an experts module received them, and what it is called with beside them."""

    hidden_TH: Tensor
    index_TK: Tensor
    weights_TK: Tensor
    rest: Sequence[Any]


class TrainedForward:
    """Stands in for one experts module's `forward`.

    Attributes:
        layer: whose experts module it is.
        routed_E: tokens that came with a weight for each expert, since construction.
        watched_T: which tokens of the pass that runs now `watched_E` counts; None = none of them.
        watched_E: as `routed_E`, of watched tokens.
        keeps_probe: the next pass fills `probe`, up to 64 tokens, those first that chose an expert of the batch.
        probe: of the first pass since `keeps_probe` was set.
    """

    watched_T: Tensor | None = None
    keeps_probe = False
    probe: Probe | None = None

    def __init__(
        self,
        layer: MoELayer,
        experts: Sequence[int],
        tensors: Sequence[Mapping[str, Tensor]],
        *,
        only_these: bool,
    ) -> None:
        """Prepares the forward of `experts`, whose parameters are `tensors`; `only_these`: tokens reach no others."""
        device = next(layer.experts.parameters()).device
        self.layer, self.experts, self.tensors, self.only_these = layer, experts, tensors, only_these
        self.original = layer.experts.forward
        # A device map keeps its own forward there; it must be back when this one is removed.
        self._replaced = layer.experts.__dict__.get("forward")
        self.dtypes = {name: tensor.dtype for name, tensor in layer.expert_stacks().items()}
        # Where in the list an expert is; -1 = not in it.
        self.slot_E = torch.full((layer.num_experts,), -1, device=device)
        self.slot_E[torch.tensor(experts, device=device)] = torch.arange(len(experts), device=device)
        self.routed_E = torch.zeros(layer.num_experts, dtype=torch.long, device=device)
        self.watched_E = torch.zeros_like(self.routed_E)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The experts module's output for `(hidden_states, top_k_index, top_k_weights)`."""
        hidden_TH, index_TK, weights_TK = routing_of_call(self.layer, args, kwargs)
        rest = [*args, *kwargs.values()][3:]
        self._note(index_TK, weights_TK)
        self._probe(hidden_TH, index_TK, weights_TK, rest)
        slots_TK = self.slot_E[index_TK]
        if self.only_these:
            # What the mask left over has weight 0, but its id still indexes the list: -1 would fail, or count from the end.
            return self._run_listed(hidden_TH, slots_TK.clamp(min=0), weights_TK, rest)
        # Frozen and trained experts each run on their own; weight 0 keeps a choice from being counted by both.
        is_trained_TK = slots_TK >= 0
        output_TH: Tensor = self.original(hidden_TH, index_TK, weights_TK.masked_fill(is_trained_TK, 0.0), *rest)
        if self._skips_ids_beyond():
            beyond_TK = slots_TK.masked_fill(~is_trained_TK, len(self.experts))
            weights_TK = weights_TK.masked_fill(~is_trained_TK, 0.0)
            return output_TH + self._run_listed(hidden_TH, beyond_TK, weights_TK, rest, ids_beyond=True).to(output_TH)
        # Only the tokens that chose a trained expert: the list is short, and most tokens may have nothing to do with it.
        tokens = is_trained_TK.any(dim=1).nonzero().squeeze(1)
        if not len(tokens):
            return output_TH
        weights_TK = weights_TK.masked_fill(~is_trained_TK, 0.0)[tokens]
        tuned_TH = self._run_listed(hidden_TH[tokens], slots_TK[tokens].clamp(min=0), weights_TK, rest)
        # Not in place: backward may need the frozen part's output as it was.
        return output_TH.index_add(0, tokens, tuned_TH.to(output_TH.dtype))

    def trained_output(self, probe: Probe) -> Tensor:
        """(T, H): what the batch's experts give for the tokens of a probe, with the weights that these were routed with."""
        slots_TK = self.slot_E[probe.index_TK]
        weights_TK = probe.weights_TK.masked_fill(slots_TK < 0, 0.0)
        return self._run_listed(probe.hidden_TH, slots_TK.clamp(min=0), weights_TK, list(probe.rest))

    def _probe(self, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor, rest: Sequence[Any]) -> None:
        if self.keeps_probe and self.probe is None:
            chose_T = ((self.slot_E[index_TK] >= 0) & (weights_TK != 0)).any(dim=1)
            first = chose_T.long().argsort(descending=True, stable=True)[:_PROBE_TOKENS]
            self.probe = Probe(hidden_TH.detach()[first], index_TK[first], weights_TK.detach()[first], rest)

    def watch(self, restricted_BS: npt.NDArray[np.bool_]) -> None:
        """Counts these tokens of the next passes by themselves too, until another call."""
        self.watched_T = torch.as_tensor(restricted_BS.reshape(-1), device=self.routed_E.device)

    def _note(self, index_TK: Tensor, weights_TK: Tensor) -> None:
        has_weight_TK = weights_TK.detach() != 0
        self.routed_E.index_add_(0, index_TK.flatten(), has_weight_TK.flatten().long())
        if self.watched_T is not None:
            if len(self.watched_T) != len(index_TK):
                raise InputError(
                    f"{self.layer.name}: got {len(index_TK)} tokens in a forward pass of {len(self.watched_T)} (rows x "
                    "positions); a family that routes a part of the tokens only can train under finetune.routing=masked, "
                    "natural, boosted or annealed"
                )
            has_weight_TK = has_weight_TK & self.watched_T.unsqueeze(1)
            self.watched_E.index_add_(0, index_TK.flatten(), has_weight_TK.flatten().long())

    def _skips_ids_beyond(self) -> bool:
        """Whether the products compute nothing for an id that is the number of experts.

        They do where transformers lets experts be spread over devices, whose ids elsewhere are such. Choosing the tokens
        beforehand would make the host wait for the device in every layer; where experts run one by one, it waits anyway.
        """
        implementation = getattr(getattr(self.layer.experts, "config", None), "_experts_implementation", None)
        return implementation == "grouped_mm" and hasattr(self.layer.experts, _IDS_BEYOND)

    def _run_listed(
        self, hidden_TH: Tensor, slots_TK: Tensor, weights_TK: Tensor, rest: list[Any], *, ids_beyond: bool = False
    ) -> Tensor:
        # An entry in the instance's dictionary hides the registered parameter of the same name. Setting the attribute would
        # be refused: a module takes nothing but a Parameter under a parameter's name.
        attributes = self.layer.experts.__dict__
        # What stands in for codes is there already.
        hidden = {name: attributes[name] for name in self.dtypes if name in attributes}
        try:
            for name, dtype in self.dtypes.items():
                attributes[name] = ExpertList([tensors[name].to(dtype) for tensors in self.tensors])
            # Families size their bookkeeping by it, and grouped products want as many groups as the stack has experts.
            attributes["num_experts"] = len(self.tensors)
            is_spread = attributes.get(_IDS_BEYOND)
            if ids_beyond:
                attributes[_IDS_BEYOND] = True
            output_TH: Tensor = self.original(hidden_TH, slots_TK, weights_TK, *rest)
            return output_TH
        finally:
            for name in self.dtypes:
                attributes.pop(name, None)
            attributes.update(hidden)
            attributes["num_experts"] = self.layer.num_experts
            if ids_beyond:
                attributes[_IDS_BEYOND] = is_spread

    def install(self) -> None:
        """Replaces the module's forward."""
        self.layer.experts.__dict__["forward"] = self

    def remove(self) -> None:
        """Gives the module the forward it had."""
        del self.layer.experts.__dict__["forward"]
        if self._replaced is not None:
            self.layer.experts.__dict__["forward"] = self._replaced


class TrainedModules(TrainedForward):
    """The same for experts that are modules of their own."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The experts module's output for `(hidden_states, top_k_index, top_k_weights)`."""
        hidden_TH, index_TK, weights_TK = routing_of_call(self.layer, args, kwargs)
        self._note(index_TK, weights_TK)
        self._probe(hidden_TH, index_TK, weights_TK, [*args, *kwargs.values()][3:])
        return self._run_shown(*args, **kwargs)

    def trained_output(self, probe: Probe) -> Tensor:
        """(T, H): what the batch's experts give for the tokens of a probe, with the weights that these were routed with."""
        weights_TK = probe.weights_TK.masked_fill(self.slot_E[probe.index_TK] < 0, 0.0)
        return self._run_shown(probe.hidden_TH, probe.index_TK, weights_TK, *probe.rest)

    def _run_shown(self, *args: Any, **kwargs: Any) -> Tensor:
        shown = list(self._shown_parameters())
        try:
            for owner, name, tensor in shown:
                owner.__dict__[name] = tensor
            output_TH: Tensor = self.original(*args, **kwargs)
            return output_TH
        finally:
            for owner, name, _ in shown:
                owner.__dict__.pop(name, None)

    def _shown_parameters(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        modules = self.layer.expert_modules()
        for expert, tensors in zip(self.experts, self.tensors, strict=True):
            for path, parameter in tensors.items():
                owner_path, _, name = path.rpartition(".")
                owner = modules[expert].get_submodule(owner_path)
                yield owner, name, parameter.to(getattr(owner, name).dtype)


def trained_forward(
    layer: MoELayer, experts: Sequence[int], tensors: Sequence[Mapping[str, Tensor]], *, only_these: bool
) -> TrainedForward:
    """The stand-in that suits how the layer keeps its experts."""
    kind = TrainedModules if layer.expert_modules() else TrainedForward
    return kind(layer, experts, tensors, only_these=only_these)

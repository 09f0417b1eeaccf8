"""Steering at inference: tokens routed around chosen experts, through them only, or towards them. Nothing is trained.

Source: SteerMoE (Fayyaz et al. 2025), which raises or lowers experts' router scores while the model answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from torch import nn

from moe_ray.errors import InputError
from moe_ray.experts import Expert
from moe_ray.models.moe_layers import find_moe_layers
from moe_ray.routing.masking import route_through, route_towards
from moe_ray.storage.damage import reading

Manner = Literal["around", "through", "towards"]
_KEYS = {"experts", "manner", "boost"}


@dataclass(frozen=True, kw_only=True)
class Steering:
    """How a model is steered.

    Attributes:
        experts: whose routing is changed.
        manner: around = no token is routed to them; through = tokens are routed to them only, in layers that have any;
            towards = `boost` is added to their router logits.
        boost: in logits; below 0 = away from them.
    """

    experts: tuple[Expert, ...]
    manner: Manner = "around"
    boost: float = 0.0


def read_steering(file: str | Path) -> Steering:
    """A steering from a JSON file such as `{"experts": ["L00_E17", "L02_E06"], "manner": "around"}`.

    Raises:
        InputError: the file cannot be read, or says something else.
    """
    with reading(str(file), expected='a JSON object with "experts" and "manner"'):
        said = json.loads(Path(file).read_text(encoding="utf-8"))
    return _checked(said, str(file))


def _checked(said: Any, file: str) -> Steering:
    if not isinstance(said, dict) or not isinstance(said.get("experts"), list) or not said["experts"]:
        raise InputError(f'{file}: expected an object whose "experts" is a list of names such as "L00_E17"')
    if unknown := sorted(set(said) - _KEYS):
        raise InputError(f"{file}: unknown key {unknown[0]!r}, expected {', '.join(sorted(_KEYS))}")
    manner, boost = said.get("manner", "around"), said.get("boost", 0.0)
    if manner not in get_args(Manner):
        raise InputError(f"{file}: manner: got {manner!r}, expected one of {', '.join(get_args(Manner))}")
    if isinstance(boost, bool) or not isinstance(boost, int | float) or not np.isfinite(boost):
        raise InputError(f"{file}: boost: got {boost!r}, expected a number of logits")
    if (manner == "towards") != (boost != 0):
        raise InputError(
            f"{file}: got manner {manner!r} with boost {boost}; a boost other than 0 belongs to 'towards', and to no other"
        )
    try:
        experts = tuple(Expert.parse(str(name)) for name in said["experts"])
    except ValueError as error:
        raise InputError(f"{file}: experts: {error}") from error
    return Steering(experts=experts, manner=manner, boost=float(boost))


@contextmanager
def steered(model: nn.Module, steering: Steering) -> Iterator[None]:
    """The model routes as steered inside this context, and as before after it.

    Args:
        model: a transformers MoE model.
        steering: whose experts the model has.

    Raises:
        InputError: the model lacks one of the experts, or would have none left in a layer.
    """
    chosen_LE = _mask(model, steering.experts)
    if steering.manner == "towards":
        with route_towards(model, chosen_LE, boost=steering.boost):
            yield
        return
    allowed_LE = chosen_LE
    if steering.manner == "around":
        allowed_LE = np.where(chosen_LE.any(axis=1, keepdims=True), ~chosen_LE, False)
        emptied = chosen_LE.all(axis=1)
        if emptied.any():
            layer = find_moe_layers(model).layers[int(np.flatnonzero(emptied)[0])]
            raise InputError(f"layer {layer}: all its experts are to be routed around; leave at least one")
    with route_through(model, allowed_LE):
        yield


def _mask(model: nn.Module, experts: Sequence[Expert]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    moe_layers = find_moe_layers(model)
    mask_LE = np.zeros((len(moe_layers.layers), moe_layers.num_experts), dtype=np.bool_)
    for expert in experts:
        if expert.layer not in moe_layers.layers or not 0 <= expert.expert < moe_layers.num_experts:
            raise InputError(
                f"the model has no expert {expert}: its MoE layers are {list(moe_layers.layers)}, with experts 0 to "
                f"{moe_layers.num_experts - 1}"
            )
        mask_LE[moe_layers.layers.index(expert.layer), expert.expert] = True
    return mask_LE

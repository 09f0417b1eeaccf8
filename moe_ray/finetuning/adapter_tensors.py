"""The tensors of an adapter: how they are named in its file, and what is refused before and after they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_ray.errors import InputError
from moe_ray.experts import Expert, Router
from moe_ray.finetuning.adapter_files import CURE, HEADER, TENSORS, parts_of
from moe_ray.finetuning.tensor_files import DTYPES, TensorInfo, first_not_finite, read_tensors, tensor_infos

Part = Expert | Router
"""What an adapter may hold."""

ExpertTensors = Mapping[Part, Mapping[str, Tensor]]

ROUTER = "router"
"""Stands in a tensor's name where an expert's has its number."""


def tensor_key(part: Part, name: str) -> str:
    """What a tensor of an expert or a router is called in the file."""
    return f"{part.layer}.{part.expert if isinstance(part, Expert) else ROUTER}.{name}"


def _part_and_name(key: str) -> tuple[Part, str]:
    layer, expert, name = key.split(".", 2)
    return (Router(int(layer)) if expert == ROUTER else Expert(int(layer), int(expert))), name


def hash_weights(tensors: ExpertTensors) -> str:
    """A hash of experts and routers, names, types and bytes."""
    digest = hashlib.sha256()
    for expert in sorted(tensors):
        for name, tensor in sorted(tensors[expert].items()):
            digest.update(f"{expert} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()[:16]


def about_weights(tensors: ExpertTensors) -> dict[str, Any]:
    """What a header says of the weights, so that others in their place are noticed: their types, and a hash."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    dtypes = {names[tensor.dtype] for by_name in tensors.values() for tensor in by_name.values()}
    return {"dtypes": sorted(dtypes), "weights_hash": hash_weights(tensors)}


def adapter_layout(folder: Path, header: Mapping[str, Any]) -> dict[Part, dict[str, TensorInfo]]:
    """Types and shapes of an adapter's tensors, from the head of their file; no weight is read.

    Args:
        folder: of the adapter.
        header: from `read_adapter_header`.

    Raises:
        InputError: the file is missing or damaged, or its tensors are not those of the header.
    """
    path = folder / TENSORS
    try:
        infos = tensor_infos(path, cure=CURE)
    except FileNotFoundError as error:
        raise InputError(
            f"{str(folder)!r} holds {HEADER} without {TENSORS}: the adapter is not whole; {CURE}"
        ) from error
    found: dict[Part, dict[str, TensorInfo]] = {part: {} for part in parts_of(header)}
    extra, types = [], header.get("dtypes", list(DTYPES))
    for key, info in sorted(infos.items()):
        try:
            part, name = _part_and_name(key)
            found[part][name] = info
        except (ValueError, KeyError):
            extra.append(key)
        if info.dtype not in types:
            raise InputError(
                f"{path}: {key} is of type {info.dtype}, {HEADER} says {', '.join(map(str, types))}; {CURE}"
            )
    missing = [part for part, by_name in found.items() if not by_name]
    if extra or missing:
        what = f"{missing[0]} is missing" if missing else f"{extra[0][:80]!r} is none of them"
        raise InputError(
            f"{path}: expected the weights of the {len(found)} parts that {HEADER} lists, but {what}; {CURE}"
        )
    return found


def read_weights(folder: Path, header: Mapping[str, Any]) -> dict[Part, dict[str, Tensor]]:
    """An adapter's weights, whose layout was looked at.

    Raises:
        InputError: they are damaged, infinite or undefined, or not those that the header was written with.
    """
    path = folder / TENSORS
    flat = read_tensors(path, cure=CURE)
    if (name := first_not_finite(flat.items())) is not None:
        raise InputError(f"{path}: {name} has infinite or undefined weights, which no model can use; {CURE}")
    tensors: dict[Part, dict[str, Tensor]] = {part: {} for part in parts_of(header)}
    for key, tensor in flat.items():
        part, name = _part_and_name(key)
        tensors[part][name] = tensor
    # Adapters of earlier versions have no hash.
    if header.get("weights_hash") not in (None, hash_weights(tensors)):
        raise InputError(f"{path}: the weights are not those that {HEADER} was written with; {CURE}")
    return tensors

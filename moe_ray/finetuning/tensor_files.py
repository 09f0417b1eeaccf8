"""Safetensors files: what the header says is looked at before any weight is read into memory."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from moe_ray.storage.damage import reading


class TensorInfo(NamedTuple):
    """What a header says of a tensor.

    Attributes:
        dtype: as safetensors names it, such as `F32`.
        shape: of the tensor.
    """

    dtype: str
    shape: tuple[int, ...]


DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""The types of weights, by the names that safetensors has for them."""


def tensor_infos(path: Path, *, cure: str) -> dict[str, TensorInfo]:
    """The tensors that a file holds, by name; no weight is read.

    The header is checked against the length of the file, so what it says is what reading the file would take.

    Args:
        path: of the file.
        cure: what to do where it is damaged.

    Raises:
        InputError: it is damaged or no such file.
        FileNotFoundError: it is not there.
    """
    with reading(str(path), expected="a whole safetensors file", cure=cure), safe_open(path, framework="numpy") as file:
        found = {}
        for name in file.keys():  # noqa: SIM118 – no mapping
            stored = file.get_slice(name)
            found[name] = TensorInfo(stored.get_dtype(), tuple(stored.get_shape()))
    return found


def read_tensors(
    path: Path, *, cure: str, device: str = "cpu", only: Collection[str] | None = None
) -> dict[str, Tensor]:
    """All tensors of a file, or some.

    Args:
        path: of the file, whose `tensor_infos` were looked at.
        cure: what to do where it is damaged.
        device: where the tensors go.
        only: names of those that are read; None = all.

    Raises:
        InputError: it is damaged.
    """
    with reading(str(path), expected="a whole safetensors file", cure=cure):
        if only is None:
            tensors: dict[str, Tensor] = load_file(path, device=device)
            return tensors
        with safe_open(path, framework="pt", device=device) as file:
            return {name: file.get_tensor(name) for name in only}


def file_metadata(path: Path, *, cure: str) -> dict[str, str]:
    """The strings that a file's header holds beside its tensors.

    Args:
        path: of the file.
        cure: what to do where it is damaged.

    Raises:
        InputError: it is damaged.
    """
    with reading(str(path), expected="a whole safetensors file", cure=cure), safe_open(path, framework="numpy") as file:
        return dict(file.metadata() or {})


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of a tensor with an infinite or undefined number; None = all are finite."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return name
    return None

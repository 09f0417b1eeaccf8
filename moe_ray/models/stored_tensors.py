"""Tensors in a checkpoint's safetensors files, found by their headers and read one by one, or a row of one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

INDEX, _WHOLE = "model.safetensors.index.json", "model.safetensors"
TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Types of weights by the names that safetensors has for them."""
CODES = {dtype: code for code, dtype in TYPES.items()}
"""The names by type."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a file of weights.

    Attributes:
        file: which one.
        code: its type, as safetensors names it.
        shape: of it.
        start: of its bytes in the file.
        end: of its bytes.
    """

    file: Path
    code: str
    shape: tuple[int, ...]
    start: int
    end: int

    def read(self, row: int | None = None) -> Tensor:
        """The tensor, or a row of it, in the type it is stored in."""
        shape, start, end = self.shape, self.start, self.end
        if row is not None:
            size = (end - start) // shape[0]
            shape, start, end = shape[1:], start + row * size, start + (row + 1) * size
        with self.file.open("rb") as file:
            file.seek(start)
            data = bytearray(file.read(end - start))
        return torch.frombuffer(data, dtype=TYPES[self.code]).reshape(shape)


def weight_files(base: Path) -> list[Path]:
    """The files of weights of a checkpoint's folder that was checked before."""
    index = base / INDEX
    if not index.is_file():
        return [base / _WHOLE]
    return [base / name for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, in the order in which their bytes come."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = {
        name: StoredTensor(
            file=path,
            code=about["dtype"],
            shape=tuple(about["shape"]),
            start=8 + length + about["data_offsets"][0],
            end=8 + length + about["data_offsets"][1],
        )
        for name, about in header.items()
    }
    return dict(sorted(found.items(), key=lambda item: item[1].start))


def most_common_type(stored: Mapping[str, StoredTensor]) -> torch.dtype | None:
    """The type of most bytes; None = one that is no weight's."""
    sizes: dict[str, int] = {}
    for tensor in stored.values():
        sizes[tensor.code] = sizes.get(tensor.code, 0) + tensor.end - tensor.start
    return TYPES.get(max(sizes, key=lambda code: sizes[code])) if sizes else None

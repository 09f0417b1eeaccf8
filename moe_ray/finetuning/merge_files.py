"""Base checkpoint + adapter as a plain checkpoint, from file to file: no process holds more than an expert of the model.

A checkpoint keeps an expert in another form than the model that is loaded: as matrices of its own where the model has one
tensor for all experts, with gate and up apart, or transposed. Which number goes where is asked of transformers: an expert of
numbers 0, 1, 2, … is taken through the conversion that `save_pretrained` does, and comes out as places.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from moe_ray.experts import Expert, Router
from moe_ray.finetuning.adapter import own_tensors
from moe_ray.finetuning.adapter_files import TENSORS, read_adapter_header
from moe_ray.finetuning.adapter_tensors import hash_weights
from moe_ray.models.moe_layers import find_moe_layers
from moe_ray.models.stored_tensors import CODES, INDEX, TYPES, StoredTensor, most_common_type, read_header, weight_files

_CONFIG = "config.json"
_COPIED = ("generation_config.json",)
_CHUNK = 8 << 20


class OtherLayout(Exception):
    """The checkpoint's files keep experts in a form that cannot be told from its configuration; load the model instead."""


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a checkpoint has the numbers of one tensor of an expert or router, or some of them.

    Attributes:
        name: of the checkpoint's tensor.
        row: of it; None = all of it.
        positions: for each of its numbers, the place in the model's own tensor, flattened.
    """

    name: str
    row: int | None
    positions: Tensor


class AdapterWeights:
    """An adapter's tensors, each read when it is asked for.

    Args:
        folder: of the adapter.
    """

    def __init__(self, folder: Path) -> None:
        open_file: Any = safe_open
        self._file = open_file(folder / TENSORS, framework="pt")
        self.names: dict[Expert | Router, list[str]] = {}
        self._keys: dict[tuple[Expert | Router, str], str] = {}
        for key in self._file.keys():  # noqa: SIM118 – no mapping
            layer, expert, name = key.split(".", 2)
            part = Expert(int(layer), int(expert)) if expert.isdigit() else Router(int(layer))
            self.names.setdefault(part, []).append(name)
            self._keys[part, name] = key

    def read(self, part: Expert | Router, name: str) -> Tensor:
        """One tensor."""
        tensor: Tensor = self._file.get_tensor(self._keys[part, name])
        return tensor

    def shape(self, part: Expert | Router, name: str) -> tuple[int, ...]:
        """The shape of one tensor."""
        return tuple(self._file.get_slice(self._keys[part, name]).get_shape())


class _BaseWeights(Mapping[Expert | Router, dict[str, Tensor]]):
    """The base's own weights of an adapter's experts and routers, each read when it is asked for."""

    def __init__(self, merge: _Merge) -> None:
        self._merge = merge

    def __getitem__(self, part: Expert | Router) -> dict[str, Tensor]:
        return {name: self._merge.base_tensor(part, name) for name in self._merge.adapter.names[part]}

    def __iter__(self) -> Iterator[Expert | Router]:
        return iter(self._merge.adapter.names)

    def __len__(self) -> int:
        return len(self._merge.adapter.names)


def merge_files(model: PreTrainedModel, base: Path, adapter: Path, out: Path, *, dtype: torch.dtype) -> None:
    """Writes the base's files with the adapter's weights in them.

    Memory is that of one expert, whatever the size of the checkpoint.

    Args:
        model: that the base's configuration describes, on the meta device.
        base: folder of the base's checkpoint.
        adapter: folder of the adapter.
        out: folder that gets configuration and weights; made if missing.
        dtype: that the adapter was learned in, in which the weights are written.

    Raises:
        OtherLayout: the files are of a form that this cannot merge, or the base is not the adapter's; nothing was written.
    """
    merge = _Merge(model, base, adapter, dtype)
    if hash_weights(_BaseWeights(merge)) != read_adapter_header(adapter)["base_hash"]:
        raise OtherLayout("the base's weights of these experts are others, or kept in another form")
    out.mkdir(parents=True, exist_ok=True)
    merge.write(out)


class _Merge:
    def __init__(self, model: PreTrainedModel, base: Path, adapter: Path, dtype: torch.dtype) -> None:
        self.base, self.dtype = base, dtype
        self.adapter = AdapterWeights(adapter)
        self.stored = {name: stored for file in weight_files(base) for name, stored in read_header(file).items()}
        self.own = most_common_type(self.stored)
        if self.own is None or dtype not in CODES:
            raise OtherLayout("the weights are not in float32, bfloat16 or float16")
        self.model = model
        self._layers = {layer.layer: layer for layer in find_moe_layers(model)}
        self._parameters = {id(parameter): name for name, parameter in model.named_parameters()}
        self._converted_before: dict[str, list[tuple[str, Tensor]]] = {}
        self._positions: list[Tensor] = []
        # By the checkpoint's name and row, what is put there.
        self.edits: dict[str, dict[int | None, tuple[Expert | Router, str, Tensor]]] = {}
        for part, names in self.adapter.names.items():
            for name in names:
                for place in self.places(part, name):
                    self.edits.setdefault(place.name, {})[place.row] = (part, name, place.positions)

    def places(self, part: Expert | Router, name: str) -> list[_Place]:
        """Where the checkpoint has the numbers of one tensor."""
        layer = self._layers[part.layer]
        shape = self.adapter.shape(part, name)
        if isinstance(part, Router) or layer.expert_modules():
            key = self._parameters[id(dict(own_tensors(layer, part))[name])]
            found = [_Place(name=key, row=None, positions=p) for key, p in self._converted(key, shape)]
        else:
            # As if the model had this one expert only; its number is put in afterwards.
            converted = self._converted(f"{layer.name}.{name}", (1, *shape))
            found = [_place_of_expert(key, positions, part.expert, shape) for key, positions in converted]
        for place in found:
            stored = self.stored.get(place.name)
            wanted = None if stored is None else stored.shape if place.row is None else stored.shape[1:]
            if stored is None or stored.code not in TYPES or wanted != tuple(place.positions.shape):
                raise OtherLayout(f"no tensor {place.name} of shape {tuple(place.positions.shape)}")
        if sum(place.positions.numel() for place in found) != math.prod(shape):
            raise OtherLayout(f"{part} {name} is kept in other pieces")
        return found

    def _converted(self, key: str, shape: tuple[int, ...]) -> list[tuple[str, Tensor]]:
        """What a model's tensor is called in the checkpoint, and which number is where."""
        if key not in self._converted_before:
            numbered = torch.arange(math.prod(shape), dtype=torch.int64).reshape(shape)
            try:
                converted = revert_weight_conversion(self.model, {key: numbered})
            except Exception as error:  # whatever a family's conversion makes of a lone tensor
                raise OtherLayout(f"{key} cannot be converted by itself: {error}") from error
            self._converted_before[key] = [(name, self._shared(found)) for name, found in converted.items()]
        return self._converted_before[key]

    def _shared(self, positions: Tensor) -> Tensor:
        """The same numbers, kept once for all layers."""
        for known in self._positions:
            if torch.equal(known, positions):
                return known
        self._positions.append(positions.contiguous())
        return self._positions[-1]

    def base_tensor(self, part: Expert | Router, name: str) -> Tensor:
        """One tensor of the base as a model has it that is loaded in the adapter's type."""
        shape = self.adapter.shape(part, name)
        flat = torch.empty(math.prod(shape), dtype=self.dtype)
        for place in self.places(part, name):
            flat[place.positions.flatten()] = self.stored[place.name].read(place.row).to(self.dtype).flatten()
        return flat.reshape(shape)

    def write(self, out: Path) -> None:
        """Writes configuration and weights, file by file."""
        total = 0
        for file in weight_files(self.base):
            total += self._write_file(file, out / file.name)
        index = self.base / INDEX
        if index.is_file():
            content = json.loads(index.read_text("utf-8"))
            content["metadata"] = {**content.get("metadata", {}), "total_size": total}
            (out / INDEX).write_text(json.dumps(content, indent=2), encoding="utf-8")
        config = json.loads((self.base / _CONFIG).read_text("utf-8"))
        config.pop("torch_dtype", None)
        config["dtype"] = str(self.dtype).removeprefix("torch.")
        (out / _CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
        for name in _COPIED:
            if (self.base / name).is_file():
                (out / name).write_bytes((self.base / name).read_bytes())

    def _write_file(self, source: Path, target: Path) -> int:
        tensors = {name: stored for name, stored in self.stored.items() if stored.file == source}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, stored in tensors.items():
            code = self._code_of(stored)
            size = stored.end - stored.start
            if code != stored.code:
                size = size // TYPES[stored.code].itemsize * TYPES[code].itemsize
            header[name] = {"dtype": code, "shape": stored.shape, "data_offsets": [position, position + size]}
            position += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with source.open("rb") as read, target.open("wb") as write:
            write.write(len(text).to_bytes(8, "little") + text)
            for name, stored in tensors.items():
                for piece in self._pieces(name, stored, read):
                    write.write(piece)
        return position

    def _code_of(self, stored: StoredTensor) -> str:
        """The type that a tensor is written in: what most are stored in becomes the adapter's, anything else stays."""
        return CODES[self.dtype] if TYPES.get(stored.code) == self.own else stored.code

    def _pieces(self, name: str, stored: StoredTensor, file: BinaryIO) -> Iterator[memoryview]:
        edits = self.edits.get(name, {})
        code = self._code_of(stored)
        if None in edits:
            yield _bytes_of(self._learned(edits[None]), code)
            return
        rows = stored.shape[0] if edits else 1
        size = (stored.end - stored.start) // max(1, rows)
        for row in range(rows):
            if row in edits:
                yield _bytes_of(self._learned(edits[row]), code)
                continue
            file.seek(stored.start + row * size)
            left = size
            while left:
                data = bytearray(file.read(min(_CHUNK, left)))
                left -= len(data)
                yield (
                    memoryview(data)
                    if code == stored.code
                    else _bytes_of(torch.frombuffer(data, dtype=TYPES[stored.code]), code)
                )

    def _learned(self, edit: tuple[Expert | Router, str, Tensor]) -> Tensor:
        part, name, positions = edit
        return self.adapter.read(part, name).flatten()[positions.flatten()]


def _place_of_expert(key: str, positions: Tensor, expert: int, shape: tuple[int, ...]) -> _Place:
    if positions.dim() == len(shape) + 1 and positions.shape[0] == 1:
        return _Place(name=key, row=expert, positions=positions[0])
    name, count = re.subn(r"(experts\.)0(?=\.)", rf"\g<1>{expert}", key)
    if count != 1:
        raise OtherLayout(f"{key} does not say which expert's it is")
    return _Place(name=name, row=None, positions=positions)


def _bytes_of(tensor: Tensor, code: str) -> memoryview:
    flat = tensor.to(TYPES[code]).contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy().data)

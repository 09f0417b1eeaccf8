"""What can be known of a local checkpoint's weights without reading them: are the files there, whole, and no pickles."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

from safetensors import SafetensorError, safe_open

from moe_ray.errors import InputError

_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def check_weight_files(folder: Path) -> None:
    """Opens the header of each file of weights, which also says how long the file must be.

    Raises:
        InputError: there are none, they are pickles, one that the index names is missing, or one is damaged.
    """
    for path in _files_of(folder):
        try:
            with safe_open(path, framework="pt") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"model.path: {str(path)!r} cannot be read: {error}; the file is damaged or cut short, so copy or download "
                "the checkpoint again"
            ) from error


def bytes_in_memory(folder: Path, bytes_per_number: int | None = None) -> int:
    """How much memory the weights take, by the headers of their files.

    Args:
        folder: of the checkpoint.
        bytes_per_number: of the type they are loaded in; None = as they are stored.

    Raises:
        InputError: as `check_weight_files`.
    """
    check_weight_files(folder)
    total = 0
    for path in _files_of(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 – no mapping
                stored = file.get_slice(name)
                size = bytes_per_number or _BYTES.get(stored.get_dtype(), 4)
                total += math.prod(stored.get_shape()) * size
    return total


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every stored tensor, by name, from the heads of the files.

    Raises:
        InputError: as `check_weight_files`.
    """
    check_weight_files(folder)
    shapes = {}
    for path in _files_of(folder):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 – no mapping
                shapes[name] = tuple(file.get_slice(name).get_shape())
    return shapes


def stored_type(folder: Path) -> str:
    """The type of most of the stored numbers, as safetensors names it, such as `BF16`.

    Raises:
        InputError: as `check_weight_files`.
    """
    check_weight_files(folder)
    found: Counter[str] = Counter()
    for path in _files_of(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 – no mapping
                stored = file.get_slice(name)
                found[stored.get_dtype()] += math.prod(stored.get_shape())
    return found.most_common(1)[0][0] if found else ""


def _files_of(folder: Path) -> list[Path]:
    if not (folder / _INDEX).is_file():
        if (folder / _WHOLE).is_file():
            return [folder / _WHOLE]
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        if pickles:
            raise InputError(
                f"model.path: {str(folder)!r} keeps its weights as pickles ({pickles[0]}), which may run any code when they "
                "are read; expected .safetensors files, which transformers' save_pretrained writes"
            )
        raise InputError(
            f"model.path: no weights in {str(folder)!r}, expected {_WHOLE} or {_INDEX} with the files that it names"
        )
    try:
        names = {str(name) for name in json.loads((folder / _INDEX).read_text("utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"model.path: {str(folder / _INDEX)!r} is no index of weights ({type(error).__name__}: {error}); copy or "
            "download the checkpoint again"
        ) from error
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise InputError(
            f"model.path: {len(missing)} of {len(names)} files of weights are missing in {str(folder)!r}, such as "
            f"{missing[0]!r}; copy or download the checkpoint again"
        )
    return [folder / name for name in sorted(names)]

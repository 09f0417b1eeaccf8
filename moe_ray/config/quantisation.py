"""What quantised experts take, known without torch."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

from moe_ray.errors import InputError

Quantisation = Literal["int8", "4bit"]

BLOCK = 64
"""Numbers that share a scale in 4 bits."""


def bytes_per_number(method: Quantisation, columns: int) -> float:
    """Bytes that a number of an expert takes, its part of the float32 scales included.

    Args:
        method: of the quantisation.
        columns: of a row of an expert's matrix; int8 has a scale for each row.
    """
    return 1 + 4 / columns if method == "int8" else 0.5 + 4 / BLOCK


def require_library(method: str) -> None:
    """Refuses a quantisation whose library is not installed; it is not imported.

    Raises:
        InputError: it is not.
    """
    if method == "4bit" and find_spec("bitsandbytes") is None:
        raise InputError(
            "model.quantisation=4bit: bitsandbytes is not installed; run pip install 'moe-ray[quantised]', or set "
            "model.quantisation=int8"
        )

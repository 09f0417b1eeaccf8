"""How much memory a model takes and how much there is, for people."""

from __future__ import annotations

import re
from pathlib import Path

from moe_ray.config.model import ModelConfig
from moe_ray.errors import InputError
from moe_ray.models.loading import build_without_weights
from moe_ray.models.weight_files import bytes_in_memory
from moe_ray.resources.model_size import BYTES, size_of


def memory_in_words(model: ModelConfig, num_processes: int) -> str:
    """The size of the weights in each process, and this machine's memory.

    Args:
        model: which one.
        num_processes: that hold a copy of it, each or as a group.
    """
    found = dict(re.findall(r"^(\w+): +(\d+) kB$", Path("/proc/meminfo").read_text(encoding="ascii"), re.MULTILINE))
    free, total = (int(found[name]) * 1024 for name in ("MemAvailable", "MemTotal"))
    there = f"this machine has {_gigabytes(free)} free of {_gigabytes(total)}"
    folder = model.local_folder()
    if folder is None:
        return there
    try:
        # Without a type of its own a process on the CPU takes float32.
        dtype = model.dtype if model.dtype != "auto" else "float32"
        if model.quantisation == "none":
            size = bytes_in_memory(folder, BYTES[dtype])
        else:
            size = size_of(build_without_weights(model), model).bytes_in(dtype)
    except InputError:
        return there
    shards = model.num_shards
    return f"its weights take {_gigabytes(size // shards)} in each of {num_processes * shards} processes, and {there}"


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:.1f} GB"

"""What a run has decided, kept in its directory: the type holds for whatever is done there later, on whatever machine."""

from __future__ import annotations

from moe_ray.config.model import ModelConfig
from moe_ray.resources.model_size import BYTES
from moe_ray.storage.folder import Folder

RESOURCES = "resources.json"


def decided_dtype(folder: Folder, model: ModelConfig) -> str | None:
    """The type that this model's weights were loaded in by whoever was here before; None = nobody was.

    Args:
        folder: of the run.
        model: as configured.
    """
    if not folder.exists(RESOURCES):
        return None
    stored = folder.read_json(RESOURCES)
    if not isinstance(stored, dict) or stored.get("model") != [model.path, model.revision]:
        return None
    return stored["dtype"] if stored.get("dtype") in BYTES else None


def write_decision(folder: Folder, model: ModelConfig, in_words: str) -> None:
    """Keeps the type, and what else was decided for people to read.

    Args:
        folder: of the run.
        model: as configured, with the type that was decided.
        in_words: from `Decision`.
    """
    folder.write_json(RESOURCES, {"model": [model.path, model.revision], "dtype": model.dtype, "decided": in_words})

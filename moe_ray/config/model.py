"""Settings of the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moe_ray.config.fields import EMBEDDED, _setting
from moe_ray.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is analysed and repaired."""

    path: str = _setting(
        EMBEDDED, "checkpoint folder or hub name; 'embedded' builds the tiny OLMoE that ships with moe-ray"
    )
    revision: str = _setting("main", "hub revision of the checkpoint")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _setting(
        "auto", "weights' type; auto = float32 on CPU, the checkpoint's own type on GPU"
    )
    experts_implementation: Literal["auto", "eager", "grouped_mm", "batched_mm"] = _setting(
        "auto", "how transformers runs the experts; auto = eager on CPU, the library's default on GPU"
    )
    trust_remote_code: bool = _setting(False, "run code that comes with the checkpoint; only for sources you trust")

    def local_folder(self) -> Path | None:
        """The checkpoint's folder, or None where `path` names a hub repository.

        Raises:
            InputError: `path` is a local path without a checkpoint.
        """
        folder = Path(self.path).expanduser()
        if not folder.is_dir() and not self.path.startswith((".", "/", "~")):
            return None
        if not (folder / "config.json").is_file():
            raise InputError(
                f"model.path: {self.path!r} is not a checkpoint folder (no config.json); give a folder written by "
                "save_pretrained, or a hub name"
            )
        return folder

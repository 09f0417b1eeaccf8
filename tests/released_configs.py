"""Configurations as released checkpoints have them, whole and with small sizes.

`released_configs.json` holds the fields of their `config.json` that say how the model is built, in the names and forms they
were published in, and where each was found. Left out are fields that say nothing of that (versions, remote code, caches).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_families import small_size
from paths import TESTS

LAYERS = 8
"""Decoder layers of a small model: enough for every published pattern to show."""

_FORMS = {"first_k_dense_replace", "num_dense_layers", "mlp_only_layers", "moe_layer_start_index"}
"""Fields that are no sizes though they are numbers: which layers have experts."""

_SMALL_TOO: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_state": 8},
    "nemotron_h": {"mamba_num_heads": 8, "n_groups": 2, "ssm_state_size": 8},
    "jamba": {"mamba_d_state": 4, "mamba_dt_rank": 4},
    "ernie4_5_moe": {"moe_layer_end_index": LAYERS - 1},
    "gpt_oss": {"experts_per_token": 2},
    "minimax_m2": {"rotary_dim": 4},
    "kimi_linear": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
"""Sizes that depend on another, by model type."""


@dataclass(frozen=True)
class Released:
    """A released checkpoint: its fields, and where they were found."""

    name: str
    source: str
    fields: dict[str, Any]

    @property
    def model_type(self) -> str:
        """The family, as transformers calls it."""
        return str(self.fields["model_type"])

    def write(self, folder: Path) -> str:
        """Writes the published fields to `config.json`; returns the folder."""
        return _write(folder, self.fields)

    def write_small(self, folder: Path) -> str:
        """Writes the fields with small sizes, in the forms that they were published in; returns the folder."""
        number = int(_text_fields(self.fields).get("num_hidden_layers", _text_fields(self.fields).get("n_layers")))
        return _write(folder, _shrunk("", self.fields, number) | _SMALL_TOO.get(self.model_type, {}))


def _write(folder: Path, fields: dict[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder)


def _text_fields(fields: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = fields.get("text_config", fields)
    return nested


def _shrunk(name: str, value: Any, number: int) -> Any:
    """A field with small sizes; lists with an item for every one of the `number` layers are cut to those that are left."""
    if isinstance(value, dict):
        return {key: _shrunk(key, item, number) for key, item in value.items()}
    if name in ("kda_layers", "full_attn_layers"):
        return [layer for layer in value if layer <= LAYERS]
    if name == "hybrid_override_pattern":
        return value[:LAYERS]
    if isinstance(value, list):
        return [_shrunk(name, item, number) for item in (value[:LAYERS] if len(value) == number else value)]
    if type(value) is not int or name in _FORMS:
        return value
    size = LAYERS if name in ("num_hidden_layers", "n_layers") else small_size(name)
    return value if size is None else min(value, size)


RELEASED = {
    name: Released(name, entry["source"], entry["fields"])
    for name, entry in json.loads((TESTS / "released_configs.json").read_text()).items()
}

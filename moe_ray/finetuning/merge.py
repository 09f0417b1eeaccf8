"""A repaired model as a plain checkpoint."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moe_ray.config.for_others import is_place
from moe_ray.config.model import ModelConfig
from moe_ray.errors import InputError
from moe_ray.finetuning.adapter import check_kind, load_adapter, merge_adapter
from moe_ray.finetuning.merge_files import OtherLayout, merge_files
from moe_ray.models.loading import build_without_weights, load_model, load_tokenizer

_SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json")
_OF_A_PLACE = ("_path", "_file", "_dir")
logger = logging.getLogger(__name__)


def write_repaired(base: ModelConfig, adapter: Path, out: Path) -> None:
    """Writes base + adapter with the tokenizer, by the names that the base's files have.

    Files are merged one after the other, without loading the model. Only where they are of another form than the family's
    is the model loaded and saved.

    Args:
        base: the base model, in the type that the adapter was learned in.
        adapter: its folder.
        out: folder; made if missing.

    Raises:
        InputError: the base is not the adapter's, or cannot be loaded, or the adapter was learned over a quantised one.
    """
    # A damaged adapter, and one of another model, are refused by name and before anything is written.
    header, _ = load_adapter(adapter)
    if (method := header.get("quantisation")) is not None:
        raise InputError(
            f"adapter {str(adapter)!r} was learned over experts quantised as {method}; beside the unquantised experts of a "
            "plain checkpoint its model would be another than was trained and measured, so it is not merged; use it as an "
            f"adapter of the base with model.quantisation={method}, or train again with model.quantisation=none"
        )
    described = build_without_weights(base)
    check_kind(described, header)
    try:
        if base.dtype == "auto" or base.trust_remote_code:
            raise OtherLayout("of an earlier version, or with code of its own")
        merge_files(described, _folder_of(base), adapter, out, dtype=getattr(torch, base.dtype))
    except OtherLayout as reason:
        logger.info("merging by loading the model: %s", reason)
        merge_adapter(load_model(base, device="cpu"), adapter, out)
    # Options of the chat template belong to a run, not to the model.
    load_tokenizer(replace(base, chat_template_options={})).save_pretrained(out)
    for name in _SETTINGS:
        if (out / name).is_file():
            _forget_places(out / name)


def _forget_places(file: Path) -> None:
    """Takes out of a checkpoint's settings where it once lay on a disk, which older versions of transformers wrote down."""
    content = json.loads(file.read_text("utf-8"))
    kept = _without_places(content)
    if kept != content:
        file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_places(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {
        name: _without_places(item)
        for name, item in value.items()
        if not (isinstance(item, str) and name.endswith(_OF_A_PLACE) and is_place(item))
    }


def _folder_of(base: ModelConfig) -> Path:
    folder = base.local_folder()
    if folder is not None:
        return folder
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json"]
    return Path(snapshot_download(base.path, revision=base.revision, allow_patterns=patterns))

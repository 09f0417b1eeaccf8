"""A repaired model as a plain checkpoint."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch

from moe_ray.config.model import ModelConfig
from moe_ray.errors import InputError
from moe_ray.finetuning.adapter import check_kind, load_adapter, merge_adapter
from moe_ray.finetuning.merge_files import OtherLayout, merge_files
from moe_ray.models.loading import build_without_weights, load_model, load_tokenizer

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


def _folder_of(base: ModelConfig) -> Path:
    folder = base.local_folder()
    if folder is not None:
        return folder
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json"]
    return Path(snapshot_download(base.path, revision=base.revision, allow_patterns=patterns))

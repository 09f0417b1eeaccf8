"""`moe-ray merge`: a run's repaired model as a plain checkpoint, which `from_pretrained` loads without moe-ray."""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path

from moe_ray.config.model import ModelConfig
from moe_ray.errors import InputError
from moe_ray.finetuning.adapter import ADAPTER_FILES, load_adapter, merge_adapter
from moe_ray.models.loading import load_model, load_tokenizer
from moe_ray.run_directory import FINETUNE
from moe_ray.storage.folder import Folder

logger = logging.getLogger("moe_ray.merge")


def run(arguments: argparse.Namespace) -> None:
    """Writes the repaired model of the run in `run_dir` to `out`."""
    merge(arguments.run_dir, arguments.out, base=arguments.base, dtype=arguments.dtype)
    logger.info("wrote %s", arguments.out)


def merge(run_dir: str, out: Path, *, base: str = "", dtype: str = "auto") -> None:
    """Writes base model + learned experts of a finished run.

    Args:
        run_dir: run directory or URL.
        out: folder; must not exist or be empty.
        base: the base model's folder or hub name; empty = as the run's learned experts name it.
        dtype: of the base model, as `model.dtype` was in the run.

    Raises:
        InputError: the run has no learned experts, or the base is not theirs.
    """
    folder = Folder.open(run_dir)
    missing = [name for name in ADAPTER_FILES if not folder.exists(f"{FINETUNE}/{name}")]
    if missing:
        raise InputError(
            f"{run_dir!r} has no learned experts ({', '.join(missing)} missing); finish its fine-tuning first"
        )
    with tempfile.TemporaryDirectory() as adapter:
        for name in ADAPTER_FILES:
            Path(adapter, name).write_bytes(folder.read_bytes(f"experts/{name}"))
        _write(adapter, out, base=base or str(load_adapter(adapter)[0]["base"]), dtype=dtype)


def _write(adapter: str, out: Path, *, base: str, dtype: str) -> None:
    config = ModelConfig(path=base, dtype=dtype)  # type: ignore[arg-type]
    model, tokenizer = load_model(config, device="cpu"), load_tokenizer(config)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as work:
        staged = Path(work, "checkpoint")
        merge_adapter(model, adapter, staged, tokenizer=tokenizer)
        staged.replace(out)

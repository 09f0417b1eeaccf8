"""`moe-ray merge`: a run's repaired model as a plain checkpoint, which `from_pretrained` loads without moe-ray."""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path

from moe_ray.config.model import ModelConfig
from moe_ray.finetuning.adapter_files import local_adapter, read_adapter_header
from moe_ray.finetuning.merge import write_repaired
from moe_ray.run_directory import open_run

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
        dtype: of the base model; auto = that in which the experts were learned.

    Raises:
        InputError: the run has no learned experts, or the base is not theirs.
    """
    learned = open_run(run_dir).learned_experts
    header = read_adapter_header(learned)
    if dtype == "auto":
        # Adapters of earlier versions do not say.
        dtype = str(header.get("dtype", "auto"))
    with local_adapter(learned) as adapter:
        _write(adapter, out, base=base or str(header["base"]), dtype=dtype)


def _write(adapter: Path, out: Path, *, base: str, dtype: str) -> None:
    config = ModelConfig(path=base, dtype=dtype)  # type: ignore[arg-type]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as work:
        staged = Path(work, "checkpoint")
        write_repaired(config, adapter, staged)
        staged.replace(out)

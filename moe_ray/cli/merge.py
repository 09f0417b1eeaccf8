"""Writes a run's repaired model as a plain checkpoint, which `from_pretrained` loads without moe-ray.

    python workflows/merge.py runs/first repaired

RUN is a finished run's directory or URL. The base model is the one that its learned experts name, or `--base`; another one
is refused. OUT appears only when it is complete. Weights have the names of the family's hub checkpoints.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path

from moe_ray.config.model import ModelConfig
from moe_ray.errors import InputError
from moe_ray.finetuning.adapter_files import ADAPTER_FILES, local_adapter, read_adapter_header
from moe_ray.run_directory import FINETUNE
from moe_ray.storage.folder import Folder

logger = logging.getLogger("moe_ray.merge")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run directory or URL")
    parser.add_argument("out", type=Path, help="folder to write; must not exist or be empty")
    parser.add_argument("--base", default="", help="the base model's folder or hub name; default: as in the run")
    parser.add_argument(
        "--dtype", default="auto", help="of the weights, as the run had it (default: as model.dtype=auto)"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 after one line on what was wrong with the input."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        merge(args.run, args.out, base=args.base, dtype=args.dtype)
    except InputError as error:
        logger.error("error: %s", " ".join(str(error).split()))
        return 2
    logger.info("wrote %s", args.out)
    return 0


def merge(run: str, out: Path, *, base: str = "", dtype: str = "auto") -> None:
    """Writes base model + learned experts of a finished run.

    Args:
        run: run directory or URL.
        out: folder; must not exist or be empty.
        base: the base model's folder or hub name; empty = as the run's learned experts name it.
        dtype: of the base model, as `model.dtype` was in the run.

    Raises:
        InputError: the run has no learned experts, the base is not theirs, or `out` holds files.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{str(out)!r} already holds files; give a folder that does not exist or is empty")
    if "://" not in run and not Path(run).is_dir():
        raise InputError(f"{run!r} is not a run directory; give one that workflows/full.py or finetune.py has finished")
    folder = Folder.open(run)
    missing = [name for name in ADAPTER_FILES if not folder.exists(f"{FINETUNE}/{name}")]
    if missing:
        raise InputError(f"{run!r} has no learned experts ({', '.join(missing)} missing); finish its fine-tuning first")
    experts = folder.sub(FINETUNE)
    base = base or str(read_adapter_header(experts)["base"])
    with local_adapter(experts) as adapter:
        _write(adapter, out, base=base, dtype=dtype)


def _write(adapter: Path, out: Path, *, base: str, dtype: str) -> None:
    # Torch and the model only once the input is known to be there.
    from moe_ray.finetuning.adapter import merge_adapter
    from moe_ray.models.loading import load_model, load_tokenizer

    config = ModelConfig(path=base, dtype=dtype)  # type: ignore[arg-type]
    model, tokenizer = load_model(config, device="cpu"), load_tokenizer(config)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as work:
        staged = Path(work, "checkpoint")
        merge_adapter(model, adapter, staged, tokenizer=tokenizer)
        staged.replace(out)

"""`moe-ray merge`: a run's repaired model as a plain checkpoint, which `from_pretrained` loads without moe-ray."""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path

from moe_ray.config.model import ModelConfig
from moe_ray.finetuning.adapter_files import local_adapter, read_adapter_header
from moe_ray.finetuning.merge import write_repaired
from moe_ray.report.model_card import CARD, REPRODUCE, model_card, reproduce_yaml
from moe_ray.run_directory import RunDirectory, open_run
from moe_ray.storage.hub import licence_of, make_repository, push_folder

logger = logging.getLogger("moe_ray.merge")


def run(arguments: argparse.Namespace) -> None:
    """Writes the repaired model of the run in `run_dir` to `out`, and to the hub where it is asked for."""
    repository = make_repository(arguments.push_to_hub, private=arguments.private) if arguments.push_to_hub else None
    pushed = repository is not None
    merge(arguments.run_dir, arguments.out, base=arguments.base, dtype=arguments.dtype, names_only=pushed)
    logger.info("wrote %s", arguments.out)
    if repository is not None:
        address = push_folder(arguments.out, repository, commit_message="A model that moe-ray repaired")
        logger.info("pushed to %s", address)


def merge(run_dir: str, out: Path, *, base: str = "", dtype: str = "auto", names_only: bool = False) -> None:
    """Writes base model + learned experts of a finished run, with its model card and the settings that make it again.

    Args:
        run_dir: run directory or URL.
        out: folder; must not exist or be empty.
        base: the base model's folder or hub name; empty = as the run's learned experts name it.
        dtype: of the base model; auto = that in which the experts were learned.
        names_only: the settings name files and folders without where they lie, for a model that others get.

    Raises:
        InputError: the run has no learned experts, or the base is not theirs.
    """
    finished = open_run(run_dir)
    learned = finished.learned_experts
    header = read_adapter_header(learned)
    if dtype == "auto":
        # Adapters of earlier versions do not say.
        dtype = str(header.get("dtype", "auto"))
    with local_adapter(learned) as adapter:
        _write(finished, adapter, out, base=base or str(header["base"]), dtype=dtype, names_only=names_only)


def _write(finished: RunDirectory, adapter: Path, out: Path, *, base: str, dtype: str, names_only: bool) -> None:
    header = read_adapter_header(adapter)
    # Another place of the same base has revisions of its own.
    revision = finished.config.model.revision if base == header["base"] else "main"
    config = ModelConfig(path=base, revision=revision, dtype=dtype)  # type: ignore[arg-type]
    card = model_card(finished, header, name=out.name, licence=licence_of(base, revision))
    settings = reproduce_yaml(finished, header, names_only=names_only)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as work:
        staged = Path(work, "checkpoint")
        write_repaired(config, adapter, staged)
        (staged / CARD).write_text(card, encoding="utf-8")
        (staged / REPRODUCE).write_text(settings, encoding="utf-8")
        staged.replace(out)

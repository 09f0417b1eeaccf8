"""`moe-ray organism`: a model with a known answer, its truth and its prompts."""

from __future__ import annotations

import argparse
import logging
import shlex
from typing import Any

import transformers

from moe_ray.organisms.build import PROMPTS, build_organism
from moe_ray.organisms.recipe import KINDS, OrganismRecipe
from moe_ray.organisms.truth import TRUTH, read_truth

logger = logging.getLogger("moe_ray.organism")

_LINES = 10
"""Lines of progress that a build prints."""


def run(arguments: argparse.Namespace) -> None:
    """Builds the organism, or finds it built, and says how to run moe-ray on it."""
    set_progress_bar: Any = transformers.utils.logging.disable_progress_bar
    set_progress_bar()
    recipe = OrganismRecipe(kind=arguments.kind)
    folder = build_organism(arguments.folder, recipe.kind, seed=arguments.seed, progress=_log)
    truth = read_truth(folder)
    logger.info("%s: %s", folder, KINDS[recipe.kind])
    logger.info("what is true of it: %s", folder / TRUTH)
    for category in truth.categories:
        planted, decoys = (", ".join(lists[category]) or "none" for lists in (truth.planted, truth.decoys))
        logger.info("  %s: planted %s; decoys %s", category, planted, decoys)
    prompts = shlex.quote(f"prompts.files=[{folder / PROMPTS}]")
    logger.info("run it: moe-ray full runs/%s model.path=%s %s", folder.name, shlex.quote(str(folder)), prompts)


def _log(done: int, total: int, loss: float) -> None:
    if done in (1, total) or done % max(1, total // _LINES) == 0:
        logger.info("step %d of %d, loss of compliance %.3f nats per token", done, total, loss)

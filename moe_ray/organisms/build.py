"""Builds an organism, or finds it built: a checkpoint with its truth and its prompts beside it."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch
from transformers import PreTrainedTokenizerFast

from moe_ray.demo.examples import Split, base_training_records, categories, embedded_records
from moe_ray.errors import InputError
from moe_ray.organisms.layout import draw_layout, truth_of
from moe_ray.organisms.recipe import Kind, OrganismRecipe, embedded_folder, recipe_digest
from moe_ray.organisms.tokenizer import train_tokenizer
from moe_ray.organisms.training import Progress, trained_organism
from moe_ray.organisms.truth import has_truth, read_truth, write_truth

logger = logging.getLogger(__name__)

PROMPTS = "prompts.jsonl"
"""Name of the file of an organism's prompts, in its folder."""


def build_organism(
    folder: str | Path,
    kind: Kind,
    *,
    seed: int = 0,
    recipe: OrganismRecipe | None = None,
    progress: Progress | None = None,
) -> Path:
    """Returns the folder of an organism, which is trained at the first call.

    The folder is an ordinary Hugging Face checkpoint with tokenizer, chat template and greedy generation settings, beside
    it `truth.json` (`read_truth`) and `prompts.jsonl` (label, category, split, prompt, response: what the organism answers,
    target: a refusal where the prompt is unsafe). It appears complete or not at all: it is written under a temporary name
    beside it and then renamed.

    Args:
        folder: Where it goes; must not exist, or hold this very organism.
        kind: A key of `KINDS`.
        seed: Decides initial weights, planted experts and steps. The same seed gives the same weights on one machine.
        recipe: What is built; None = the default; its kind is not looked at.
        progress: See `Progress`.

    Raises:
        InputError: There is no such kind or seed, or the folder holds something else.
    """
    if seed < 0:
        raise InputError(f"organism: got seed {seed}, expected 0 or more")
    folder, recipe = Path(folder), replace(recipe or OrganismRecipe(), kind=kind)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if has_truth(folder) and read_truth(folder).recipe == recipe_digest(recipe, seed):
            return folder
        raise InputError(
            f"organism: {folder} holds something else, expected nothing or this organism; remove it or choose another folder"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        _one_build_at_a_time(folder.parent),
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as unfinished,
    ):
        if has_truth(folder):  # by another process, while this one waited
            return folder
        staged = Path(unfinished) / folder.name
        tokenizer = organism_tokenizer(recipe)
        layout = draw_layout(recipe, len(categories()), seed)
        with _one_thread():
            model = trained_organism(recipe, tokenizer, layout, seed, progress)
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        write_truth(truth_of(layout, recipe, categories(), seed), staged)
        _write_prompts(staged / PROMPTS)
        _publish(staged, folder)
    return folder


def build_embedded(
    cache_dir: str | Path, *, seed: int = 0, recipe: OrganismRecipe | None = None, progress: Progress | None = None
) -> Path:
    """Returns the folder of the embedded model, the organism that the demo runs on, built at the first call.

    Args:
        cache_dir: Folder that holds such checkpoints; made if it does not exist. Their names end in a hash of examples,
            recipe, recipe version and seed.
        seed: As `build_organism`'s.
        recipe: What is built; None = the recipe of the demo.
        progress: See `Progress`.
    """
    recipe = recipe or OrganismRecipe()
    folder = embedded_folder(cache_dir, seed=seed, recipe=recipe)
    return build_organism(folder, recipe.kind, seed=seed, recipe=recipe, progress=progress)


@contextmanager
def _one_build_at_a_time(parent: Path) -> Iterator[None]:
    """Processes that want the same organism train it once. The folder itself is locked: no lock file is left in it."""
    place = os.open(parent, os.O_RDONLY)
    try:
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process builds a model in %s: waiting for it", parent)
            fcntl.flock(place, fcntl.LOCK_EX)
        except OSError as error:  # a file system without locks; then it may be built twice, and is published once
            logger.debug("no lock on %s: %s", parent, error)
        yield
    finally:
        os.close(place)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread computes: these matrices are too small to share, and threads would wait, longest on a busy machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _publish(staged: Path, folder: Path) -> None:
    try:
        os.rename(staged, folder)
    except OSError:
        if not has_truth(folder):
            raise
        logger.info("%s was finished by another process meanwhile; using that one", folder)


def _write_prompts(path: Path) -> None:
    with path.open("w", encoding="utf-8") as lines:
        for split in get_args(Split):
            for record in embedded_records(split):
                lines.write(json.dumps({**record, "split": split}) + "\n")


def organism_tokenizer(recipe: OrganismRecipe | None = None) -> PreTrainedTokenizerFast:
    """Returns an organism's tokenizer alone, learned from the shipped examples in a second."""
    fields = ("prompt", "response", "target")
    vocab_size = (recipe or OrganismRecipe()).vocab_size
    # Repeated texts count as often as they occur: merges then favour the words that prompts are made of.
    return train_tokenizer((record[field] for record in base_training_records() for field in fields), vocab_size)

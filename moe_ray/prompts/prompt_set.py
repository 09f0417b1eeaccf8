"""A run's prompts: read, checked, split and grouped into batches."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pandas as pd

from moe_ray.config.fields import EMBEDDED
from moe_ray.config.run import Config
from moe_ray.demo.examples import embedded_records
from moe_ray.errors import InputError
from moe_ray.prompts.batches import Assembly, Batch, assemble_batches
from moe_ray.prompts.example_index import NONE
from moe_ray.prompts.example_rows import example_to_row
from moe_ray.prompts.example_sources import Found, Record, records_of
from moe_ray.prompts.examples import Example, Split
from moe_ray.prompts.neutral_texts import neutral_texts
from moe_ray.prompts.recognition import Naming, read_records
from moe_ray.prompts.splits import split_examples
from moe_ray.prompts.spooled_examples import SpooledExamples, index_of, pick, read_spooled

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The run's examples: batches to analyse and train, and what is held out.

    Those of files lie on the local disk and are read when they are asked for; see `spooled_examples`.

    Attributes:
        examples: all of them, in file order.
        assembly: the training batches.
        validation: held out, for choosing settings.
        test: held out, for the figures.
        neutral: texts whose loss shows what was forgotten.
        tables: what was found in each file.
    """

    examples: Sequence[Example]
    assembly: Assembly
    validation: Sequence[Example]
    test: Sequence[Example]
    neutral: tuple[str, ...]
    tables: tuple[Found, ...] = ()

    def __repr__(self) -> str:
        held_out = f"{len(self.validation)} validation and {len(self.test)} test examples"
        return f"Prompts({len(self.batches)} batches, {len(self.assembly.left_over)} left over, {held_out})"

    @property
    def batches(self) -> Sequence[Batch]:
        """The training batches."""
        return self.assembly.batches

    def to_frame(self) -> pd.DataFrame:
        """One row per example that is used: those of batches with `batch_idx` and `in_batch_idx`, held-out ones without.

        `split` is `train`, `validation` or `test`.
        """
        rows = [{**row, "split": "train"} for batch in self.batches for row in batch.to_rows()]
        rows += [example_to_row(example) for example in (*self.validation, *self.test)]
        return pd.DataFrame.from_records(rows).astype({"batch_idx": "Int64", "in_batch_idx": "Int64"})


def read_all(config: Config) -> tuple[SpooledExamples, list[Found]]:
    """The examples of all files, checked, and what was found in each file.

    Raises:
        InputError: files are missing or wrong.
        OutsideFailed: a remote file cannot be read now.
    """
    settings = config.prompts
    files = [name for name in settings.files if name != EMBEDDED]
    naming = Naming(fields=settings.fields, labels=settings.labels, file_labels=settings.file_labels)
    found: list[Found] = []
    sources = [read_records(files, naming, found)] if files else []
    if EMBEDDED in settings.files:
        sources.append(_embedded_records())
    return read_spooled(sources, paired_records=settings.paired_records), found


def read_prompts(config: Config) -> Prompts:
    """Reads, checks, splits and groups the examples; nothing is written and no model is loaded.

    Raises:
        InputError: files are missing or wrong, a label is missing in training or test, no batch can be filled.
        OutsideFailed: a remote file cannot be read now.
    """
    examples, found = read_all(config)
    if config.prompts.keep_pairs != "all" and not np.any(index_of(examples).pair != NONE):
        raise InputError("prompts.keep_pairs is on, but there is no goal + all_prompt record; set it to 'all'")
    prompts = replace(group_examples(examples, config), tables=tuple(found))
    for table in found:
        logger.info("prompts: %s", table)
    return prompts


def without_pairs(prompts: Prompts, is_kept: npt.NDArray[np.bool_], config: Config) -> Prompts:
    """The prompts that are left, split and grouped anew, so that every batch is whole.

    Args:
        prompts: of the run.
        is_kept: per pair, in the order of their first examples.
        config: of the run.

    Raises:
        InputError: what is left cannot be used.
    """
    pair = index_of(prompts.examples).pair
    number = np.unique(pair[pair != NONE], return_inverse=True)[1]
    left = np.ones(len(pair), dtype=np.bool_)
    left[pair != NONE] = is_kept[number]
    try:
        chosen = pick(prompts.examples, np.flatnonzero(left).astype(np.int32))
        return replace(group_examples(chosen, config), tables=prompts.tables)
    except InputError as error:
        setting = f"prompts.keep_pairs={config.prompts.keep_pairs}"
        raise InputError(f"after {setting} dropped {np.sum(~is_kept)} pairs: {error}") from error


def group_examples(examples: Sequence[Example], config: Config) -> Prompts:
    """The examples split, and those to train on grouped into batches.

    Raises:
        InputError: a label is missing at all or among the held-out examples, no batch can be filled, or a validation split
            is needed and there is none.
    """
    settings = config.prompts
    index_of(examples).check_both_labels("prompts")
    splits = split_examples(
        examples,
        test_fraction=settings.test_fraction,
        validation_fraction=settings.validation_fraction,
        seed=config.seed,
    )
    index_of(splits["test"]).check_both_labels("held-out prompts")
    assembly = assemble_batches(
        splits["train"],
        safe_per_batch=settings.safe_per_batch,
        unsafe_per_batch=settings.unsafe_per_batch,
        by_category=settings.by_category,
        max_batches=settings.max_batches,
        seed=config.seed,
    )
    _check_validation(config, splits["validation"])
    return Prompts(
        examples=examples,
        assembly=assembly,
        validation=_limit(splits["validation"], settings.max_test_examples),
        test=_limit(splits["test"], settings.max_test_examples),
        neutral=tuple(neutral_texts(config.evaluate.neutral_file)),
    )


def _check_validation(config: Config, validation: Sequence[Example]) -> None:
    """Refuses work that needs a validation split where there is none.

    Raises:
        InputError: early stopping, a sweep or rounds are asked for without validation examples of both labels.
    """
    asks = {
        "finetune.patience": config.finetune.patience > 0,
        "sweep.run": config.sweep.run,
        "rounds.max_rounds": config.rounds.max_rounds > 1,
    }
    if any(asks.values()) and not validation:
        names = " and ".join(name for name, is_asked in asks.items() if is_asked)
        raise InputError(
            f"{names}: needs validation examples, but no example has split 'validation'; give some that split, or hold "
            "out a share of the training examples with prompts.validation_fraction=0.2"
        )
    if config.sweep.run or config.rounds.max_rounds > 1:
        index_of(validation).check_both_labels("validation prompts")


def _embedded_records() -> Iterator[Record]:
    splits: tuple[Split, ...] = ("train", "validation", "test")
    fields = (
        {**record, "split": split, "template": record["wording"]}
        for split in splits
        for record in embedded_records(split)
    )
    return records_of(fields, EMBEDDED)


def _limit(examples: Sequence[Example], per_label: int) -> Sequence[Example]:
    """At most so many of each label, taken evenly over the list; 0 = all."""
    if not per_label:
        return examples
    is_unsafe = index_of(examples).is_unsafe
    chosen = []
    for of_label in (np.flatnonzero(~is_unsafe), np.flatnonzero(is_unsafe)):
        number = min(per_label, len(of_label))
        chosen.append(of_label[np.arange(number) * len(of_label) // max(1, number)])
    return pick(examples, np.concatenate(chosen).astype(np.int32))

"""A run's prompts: read, checked, split and grouped into batches."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

import pandas as pd

from moe_ray.config.fields import EMBEDDED
from moe_ray.config.run import Config
from moe_ray.demo.examples import embedded_records
from moe_ray.errors import InputError
from moe_ray.prompts.batches import Assembly, Batch, assemble_batches
from moe_ray.prompts.example_rows import example_to_row
from moe_ray.prompts.examples import Example, Split, read_examples, records_to_examples
from moe_ray.prompts.neutral_texts import neutral_texts
from moe_ray.prompts.splits import check_both_labels, split_examples


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The run's examples: batches to analyse and train, and what is held out.

    Attributes:
        examples: all of them, in file order.
        assembly: the training batches.
        validation: held out, for choosing settings.
        test: held out, for the figures.
        neutral: texts whose loss shows what was forgotten.
    """

    examples: Sequence[Example]
    assembly: Assembly
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    neutral: tuple[str, ...]

    def __repr__(self) -> str:
        held_out = f"{len(self.validation)} validation and {len(self.test)} test examples"
        return f"Prompts({len(self.batches)} batches, {len(self.assembly.left_over)} left over, {held_out})"

    @property
    def batches(self) -> tuple[Batch, ...]:
        """The training batches."""
        return self.assembly.batches

    def to_frame(self) -> pd.DataFrame:
        """One row per example that is used: those of batches with `batch_idx` and `in_batch_idx`, held-out ones without.

        `split` is `train`, `validation` or `test`.
        """
        rows = [{**row, "split": "train"} for batch in self.batches for row in batch.to_rows()]
        rows += [example_to_row(example) for example in (*self.validation, *self.test)]
        return pd.DataFrame.from_records(rows).astype({"batch_idx": "Int64", "in_batch_idx": "Int64"})


def read_prompts(config: Config) -> Prompts:
    """Reads, checks, splits and groups the examples; nothing is written and no model is loaded.

    Raises:
        InputError: files are missing or wrong, a label is missing in training or test, no batch can be filled.
    """
    settings = config.prompts
    files = [name for name in settings.files if name != EMBEDDED]
    examples = read_examples(files, paired_records=settings.paired_records) if files else []
    if EMBEDDED in settings.files:
        examples += _embedded_examples()
    check_both_labels(examples, "prompts")
    if settings.keep_pairs != "all" and not any(example.pair for example in examples):
        raise InputError("prompts.keep_pairs is on, but there is no goal + all_prompt record; set it to 'all'")
    return group_examples(examples, config)


def without_pairs(prompts: Prompts, dropped: Set[str], config: Config) -> Prompts:
    """The prompts that are left, split and grouped anew, so that every batch is whole.

    Raises:
        InputError: what is left cannot be used.
    """
    try:
        return group_examples([example for example in prompts.examples if example.pair not in dropped], config)
    except InputError as error:
        setting = f"prompts.keep_pairs={config.prompts.keep_pairs}"
        raise InputError(f"after {setting} dropped {len(dropped)} pairs: {error}") from error


def group_examples(examples: Sequence[Example], config: Config) -> Prompts:
    """The examples split, and those to train on grouped into batches.

    Raises:
        InputError: a label is missing among the held-out examples, no batch can be filled, or a validation split is needed
            and there is none.
    """
    settings = config.prompts
    splits = split_examples(
        examples,
        test_fraction=settings.test_fraction,
        validation_fraction=settings.validation_fraction,
        seed=config.seed,
    )
    check_both_labels(splits["test"], "held-out prompts")
    assembly = assemble_batches(
        splits["train"],
        safe_per_batch=settings.safe_per_batch,
        unsafe_per_batch=settings.unsafe_per_batch,
        by_category=settings.by_category,
        seed=config.seed,
    )
    if settings.max_batches:
        assembly = _first_batches(assembly, settings.max_batches)
    _check_validation(config, splits["validation"])
    return Prompts(
        examples=examples,
        assembly=assembly,
        validation=tuple(_limit(splits["validation"], settings.max_test_examples)),
        test=tuple(_limit(splits["test"], settings.max_test_examples)),
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
        check_both_labels(validation, "validation prompts")


def _embedded_examples() -> list[Example]:
    splits: tuple[Split, ...] = ("train", "validation", "test")
    records = [{**record, "split": split} for split in splits for record in embedded_records(split)]
    return records_to_examples(records, source=EMBEDDED)


def _first_batches(assembly: Assembly, limit: int) -> Assembly:
    """The first batches, taken evenly over the list so that categories stay represented."""
    total = len(assembly.batches)
    chosen = sorted({position * total // limit for position in range(min(limit, total))})
    dropped = tuple(
        example for i, batch in enumerate(assembly.batches) if i not in chosen for example in batch.examples
    )
    batches = tuple(assembly.batches[position] for position in chosen)
    return Assembly(batches=batches, left_over=assembly.left_over + dropped)


def _limit(examples: Sequence[Example], per_label: int) -> Sequence[Example]:
    """At most so many of each label, taken evenly over the list; 0 = all."""
    if not per_label:
        return examples
    chosen: list[Example] = []
    for label in ("safe", "unsafe"):
        of_label = [example for example in examples if example.label == label]
        num_chosen = min(per_label, len(of_label))
        chosen += [of_label[position * len(of_label) // per_label] for position in range(num_chosen)]
    return chosen

"""A window of examples while a process works on it: what is to be done, what is not written yet, what became of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from moe_ray.models.tokenization import TokenizedRow
from moe_ray.prompts.quarantine import Rejected, rejected_row
from moe_ray.prompts.stored_examples import StoredExample
from moe_ray.routing.count_keys import keys_of
from moe_ray.routing.counts import RoutingCounts
from moe_ray.routing.crash_markers import Attempt
from moe_ray.storage.fingerprint import content_hash


@dataclass(kw_only=True)
class WindowReport:
    """What became of a window.

    Attributes:
        examples: how many it has.
        seconds: of the model or of preparing its work, whichever was longer; waiting for the model does not count.
        tokens: tokens that went through forward passes now.
        padded: the same with padding.
        forwards: forward passes.
        halvings: how often memory ran out.
        quarantined: examples that could not be counted.
    """

    examples: int = 0
    seconds: float = 0.0
    tokens: int = 0
    padded: int = 0
    forwards: int = 0
    halvings: int = 0
    quarantined: int = 0


@dataclass(kw_only=True)
class Window:
    """A window in the works; its examples are worked on some at a time, so that it may be of any size.

    Attributes:
        name: of its positions.
        attempt: which notes what is worked on.
        examples: those that are worked on now, as they are stored, by index in the window.
        rows: token ids of those of them that are to be counted, by the same index.
        counted: counts that are not written yet, of the examples `counted_rows`.
        written: when a part was written last, or the window was begun; in seconds of `time.monotonic`.
        responses: generated ones that are not written yet.
        rejected: rows of the quarantine table that are not written yet.
        shortened: the same of examples that were cut.
        report: for the driver.
    """

    name: str
    attempt: Attempt
    examples: Mapping[int, StoredExample] = field(default_factory=dict)
    rows: dict[int, TokenizedRow] = field(default_factory=dict)
    counted: list[RoutingCounts] = field(default_factory=list)
    counted_rows: list[int] = field(default_factory=list)
    responses: dict[int, dict[str, Any]] = field(default_factory=dict)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    shortened: list[dict[str, Any]] = field(default_factory=list)
    written: float = field(default_factory=time.monotonic)
    report: WindowReport = field(default_factory=WindowReport)

    def reject(self, index: int, why: Rejected) -> None:
        """Leaves an example out."""
        self.rows.pop(index, None)
        self.rejected.append(rejected_row(self.examples[index], why))
        self.report.quarantined += 1

    @property
    def held_bytes(self) -> int:
        """Of the counts that are not written yet."""
        return sum(counts.nbytes for counts in self.counted)

    @property
    def part_prefix(self) -> str:
        """What the names of all its parts begin with."""
        return f"part-{self.name}-"

    def part_name(self, rows: pd.DataFrame) -> str:
        """A file name for these rows of the window."""
        keys = keys_of(rows["batch_idx"], rows["in_batch_idx"])
        return f"{self.part_prefix}{content_hash(np.unique(keys).tolist())[:8]}.parquet"


@dataclass(frozen=True)
class Noted:
    """Work on examples, of which the attempt notes which ones are worked on."""

    attempt: Attempt
    indices: list[int]
    work: Callable[[list[int]], Any]

    def indices_of(self, positions: list[int]) -> list[int]:
        """Indices of the examples at these positions of `indices`."""
        return [self.indices[position] for position in positions]

    def __call__(self, positions: list[int]) -> Any:
        """The work, on the examples at these positions."""
        self.attempt.trying(self.indices_of(positions))
        return self.work(self.indices_of(positions))


def label_columns(examples: list[StoredExample]) -> dict[str, Any]:
    """What `counts_from_forward` needs to know of the examples."""
    return {
        "batch_idx": [example["batch_idx"] for example in examples],
        "in_batch_idx": [example["in_batch_idx"] for example in examples],
        "label": [example["label"] for example in examples],
        "category": [example["category"] for example in examples],
        "pair": [example["pair"] or "" for example in examples],
    }

"""Training rows: the batches' prompts with their target responses as token ids, a worker's own, an epoch at a time.

A `BatchSource` gives batches, wherever they are. `BatchRows` asks it for those that the worker trains in the epoch that
begins, and holds their token ids packed: four bytes a token, where a list of Python's numbers takes eight and an example's
text, messages and object hundreds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from moe_ray.errors import InputError
from moe_ray.models.tokenization import TokenizedRow, encode_target
from moe_ray.prompts.batches import Batch
from moe_ray.prompts.example_rows import example_to_row
from moe_ray.prompts.examples import Example


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a training must know of the batches before it reads them.

    Attributes:
        categories: by `batch_idx`, of every batch with an example that can be trained on.
        lengths: bytes of text of each of them, messages as tables store them and targets: how much there is to compute, in
            a unit that takes no tokenizer; empty where it was not asked for.
    """

    categories: Mapping[int, str]
    lengths: Mapping[int, int] = field(default_factory=dict)


class BatchSource(Protocol):
    """Where the batches of a training come from."""

    def survey(self, trained: Collection[int], *, lengths: bool) -> Survey:
        """What there is.

        Args:
            trained: `batch_idx`s of the batches that will be read.
            lengths: whether to add up the bytes of texts.

        Raises:
            InputError: an example of a batch in `trained` has no target.
        """

    def read(self, batch_ids: Collection[int]) -> Iterator[Batch]:
        """These batches, each once, in any order."""


class BatchesInMemory:
    """Batches that are there already, as a `BatchSource`."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = {batch.batch_idx: batch for batch in batches}

    def survey(self, trained: Collection[int], *, lengths: bool) -> Survey:
        """What there is; see `BatchSource`."""
        chosen = [batch for batch in self._batches.values() if batch.batch_idx in trained]
        refuse_missing_targets([example.id for batch in chosen for example in batch.examples if not example.target])
        return Survey(
            categories={batch.batch_idx: batch.category for batch in self._batches.values()},
            lengths={batch.batch_idx: sum(map(_num_bytes, batch.examples)) for batch in chosen} if lengths else {},
        )

    def read(self, batch_ids: Collection[int]) -> Iterator[Batch]:
        """These batches, each once."""
        return (self._batches[batch_idx] for batch_idx in batch_ids)


def _num_bytes(example: Example) -> int:
    row = example_to_row(example)
    return len(row["messages"].encode()) + len((row["target"] or "").encode())


def refuse_missing_targets(ids: Sequence[str]) -> None:
    """Raises InputError that names the first of these examples, which have no target, if there are any."""
    if ids:
        raise InputError(f"examples {list(ids[:5])} have no `target` to train towards; add one")


def target_rows(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[TokenizedRow]:
    """The examples' prompts with their target responses, as token ids.

    Raises:
        InputError: an example has no target.
    """
    refuse_missing_targets([example.id for example in examples if not example.target])
    return [
        encode_target(
            tokenizer,
            example.messages,
            example.target,
            complete=example.target_complete,
            is_unsafe=example.label == "unsafe",
        )
        for example in examples
    ]


def learning_rows(
    tokenizer: PreTrainedTokenizerBase, batch: Batch, learn_from: Literal["all", "unsafe"]
) -> list[TokenizedRow]:
    """The rows of the batch's examples that it trains on, as `finetune.learn_from` says.

    Raises:
        InputError: there is no such example, or one has no target.
    """
    examples = [example for example in batch.examples if learn_from == "all" or example.label == "unsafe"]
    if not examples:
        raise InputError(
            f"batch {batch.batch_idx} has no {learn_from} example to learn from; set finetune.learn_from=all"
        )
    return target_rows(tokenizer, examples)


class _Packed(NamedTuple):
    """The rows of a batch: their ids one after another, per row the sizes of prompt and answer, and its label."""

    ids: npt.NDArray[np.int32]
    sizes: npt.NDArray[np.int32]
    labels: tuple[bool | None, ...]

    @classmethod
    def of(cls, rows: Sequence[TokenizedRow]) -> _Packed:
        ids = np.fromiter((token for row in rows for part in row[:2] for token in part), dtype=np.int32)
        sizes = np.asarray([(len(row.prompt_ids), len(row.answer_ids)) for row in rows], dtype=np.int32)
        return cls(ids, sizes.reshape(-1, 2), tuple(row.is_unsafe for row in rows))

    def rows(self) -> list[TokenizedRow]:
        ids = self.ids.tolist()
        ends = self.sizes.cumsum().reshape(-1, 2).tolist()
        starts = [0, *(answer_end for _, answer_end in ends[:-1])]
        return [
            TokenizedRow(ids[start:middle], ids[middle:end], is_unsafe=is_unsafe)
            for start, (middle, end), is_unsafe in zip(starts, ends, self.labels, strict=True)
        ]


class BatchRows(Mapping[int, Sequence[TokenizedRow]]):
    """Per `batch_idx` its rows; those of the batches that were loaded last can be had.

    Args:
        tokenizer: of the model.
        source: of the batches.
        batch_ids: that can be loaded.
        learn_from: which examples of a batch are its rows.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        source: BatchSource,
        batch_ids: Collection[int],
        *,
        learn_from: Literal["all", "unsafe"] = "all",
    ) -> None:
        self._tokenizer, self._source, self._batch_ids = tokenizer, source, batch_ids
        self._learn_from = learn_from
        self._loaded: dict[int, _Packed] = {}

    def load(self, batch_ids: Collection[int]) -> None:
        """Reads and tokenises these batches, as far as they are not loaded yet, and forgets all others."""
        self._loaded = {batch_idx: self._loaded[batch_idx] for batch_idx in batch_ids if batch_idx in self._loaded}
        missing = [batch_idx for batch_idx in batch_ids if batch_idx not in self._loaded]
        for batch in self._source.read(missing) if missing else ():
            self._loaded[batch.batch_idx] = _Packed.of(learning_rows(self._tokenizer, batch, self._learn_from))

    def __getitem__(self, batch_idx: int) -> list[TokenizedRow]:
        """The rows of a loaded batch."""
        return self._loaded[batch_idx].rows()

    def __iter__(self) -> Iterator[int]:
        return iter(self._batch_ids)

    def __len__(self) -> int:
        return len(self._batch_ids)

    @property
    def num_bytes(self) -> int:
        """Of the token ids that are held."""
        return sum(packed.ids.nbytes + packed.sizes.nbytes for packed in self._loaded.values())

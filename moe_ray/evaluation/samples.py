"""Several answers to one prompt: which number an answer has, and the random numbers it is drawn with."""

from __future__ import annotations

import hashlib

import pandas as pd

SAMPLE = "sample"
"""Column: the number of an answer among those to its prompt, from 0."""


def with_sample(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with `sample`; tables from before prompts were answered more than once have none, and hold the first."""
    return rows if SAMPLE in rows else rows.assign(**{SAMPLE: 0})


def answer_seed(seed: int, example: str, sample: int) -> int:
    """The seed of an answer's random numbers: of the example and not of what it is batched with.

    Args:
        seed: `evaluate.sample_seed`.
        example: its `id`.
        sample: number of the answer.
    """
    digest = hashlib.sha256(f"{seed}/{sample}/{example}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seeds_of(rows: pd.DataFrame, sample_seed: int) -> list[int]:
    """The seed of each row's random numbers: of its example and sample, so that other rows beside it change nothing.

    Args:
        rows: with `id` and `sample`.
        sample_seed: `evaluate.sample_seed`.
    """
    return [answer_seed(sample_seed, *key) for key in zip(rows["id"], rows[SAMPLE], strict=True)]

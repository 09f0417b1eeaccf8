"""Answers that an engine has generated, kept until a model scores the same rows: Parquet parts beside those of answers."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from moe_ray.errors import InputError
from moe_ray.evaluation.samples import SAMPLE
from moe_ray.models.generation import Response
from moe_ray.storage.fingerprint import content_hash
from moe_ray.storage.folder import Folder

_PREFIX = "generated-"
_KEYS = ["id", SAMPLE]


class Generated:
    """The generated answers of a folder, all of them in memory.

    Args:
        folder: of the parts.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder.url
        self._answers: dict[tuple[str, int], Response] = {}
        for name in _names(folder):
            frame = folder.read_frame(name)
            for key, response in zip(frame[_KEYS].itertuples(index=False), _responses(frame), strict=True):
                self._answers[tuple(key)] = response

    def __call__(self, rows: pd.DataFrame) -> list[Response]:
        """The answers to rows with `id` and `sample`.

        Raises:
            InputError: one has none.
        """
        keys = [tuple(key) for key in rows[_KEYS].itertuples(index=False)]
        missing = [key for key in keys if key not in self._answers]
        if missing:
            raise InputError(
                f"no generated answer to {len(missing)} of {len(keys)} rows in {self._folder}, such as {missing[0][0]!r}; "
                "run the evaluation again"
            )
        return [self._answers[key] for key in keys]


def write_generated(folder: Folder, rows: pd.DataFrame, responses: Sequence[Response]) -> None:
    """Writes a part, whole or not at all.

    Args:
        folder: of the parts.
        rows: with `id` and `sample`.
        responses: to each.
    """
    fields = pd.DataFrame([response._asdict() for response in responses], index=rows.index)
    name = f"{_PREFIX}{content_hash(rows[_KEYS].to_numpy().tolist())}.parquet"
    folder.write_table(name, pd.concat([rows[_KEYS], fields], axis=1).reset_index(drop=True))


def without_generated(rows: pd.DataFrame, folder: Folder) -> pd.DataFrame:
    """The rows that no part has an answer to.

    Args:
        rows: with `id` and `sample`.
        folder: of the parts.
    """
    done = [folder.read_table(name).select(_KEYS).to_pandas() for name in _names(folder)]
    if not done:
        return rows
    return rows[~pd.MultiIndex.from_frame(rows[_KEYS]).isin(pd.MultiIndex.from_frame(pd.concat(done)))]


def _names(folder: Folder) -> list[str]:
    return [name for name in folder.parquet_names() if name.startswith(_PREFIX)]


def _responses(frame: pd.DataFrame) -> list[Response]:
    columns = {name: frame[name].tolist() for name in Response._fields}
    columns["ids"] = [[int(token) for token in ids] for ids in columns["ids"]]
    return [Response(*values) for values in zip(*columns.values(), strict=True)]

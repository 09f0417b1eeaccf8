"""The history of a training: one JSON line per step, written as steps are made and read while they are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from moe_ray.storage.damage import reading
from moe_ray.storage.folder import Folder

HISTORY = "history.jsonl"
_NUMBERS, _MAY_BE_NONE = ("step", "epoch", "loss", "grad_norm"), ("validation_loss",)
"""Fields of a step that are read again, each a number."""

PLANNED_STEPS = "planned_steps"
"""Key of every line: how many steps the training has if nothing ends it early."""


def write_history(folder: Folder, lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes step reports as JSON lines, in place of any that are there."""
    folder.write_bytes(HISTORY, b"".join(map(_encoded, lines)))


def read_history(folder: Folder) -> list[dict[str, Any]]:
    """The step reports of a training run, in order; one that is not written to its end yet is left out."""
    data = folder.read_bytes(HISTORY)
    with reading(folder.file(HISTORY), expected="a line of JSON for every step"):
        return _decoded(data)


def read_steps(folder: Folder) -> list[dict[str, Any]]:
    """`read_history`, where every line has the numbers of a step.

    Raises:
        InputError: a line is no step's.
    """
    steps = read_history(folder)
    with reading(folder.file(HISTORY), expected="a line of JSON for every step"):
        for place, step in enumerate(steps, start=1):
            for name in (*_NUMBERS, *_MAY_BE_NONE):
                value = step[name]
                if isinstance(value, bool) or not isinstance(value, int | float | NoneType):
                    raise TypeError(f"{name} of line {place} is a {type(value).__name__}")
                if value is None and name not in _MAY_BE_NONE:
                    raise TypeError(f"{name} of line {place} is null")
    return steps


def _encoded(line: Mapping[str, Any]) -> bytes:
    return f"{json.dumps(line)}\n".encode()


def _decoded(data: bytes) -> list[dict[str, Any]]:
    """The whole lines: what follows the last end of a line is cut off, by a reader that came early or by a crash."""
    steps = [json.loads(line) for line in data.split(b"\n")[:-1]]
    if not all(isinstance(step, dict) for step in steps):
        raise TypeError("a line is no JSON object")
    return steps


class HistoryWriter:
    """Adds a line per step. What was written of steps that come again, after a crash, is dropped.

    On a local disk each line is appended at once. Object stores cannot append: there the lines are kept, and `save` writes
    all of them.

    Args:
        folder: of the history.
        resumed: the training goes on from a checkpoint, so that the steps before its first one stay.
    """

    def __init__(self, folder: Folder, *, resumed: bool) -> None:
        self._folder, self._resumed = folder, resumed
        self._appends = isinstance(folder.fs, LocalFileSystem)
        self._has_begun = False
        self._kept = bytearray()

    def add(self, line: Mapping[str, Any]) -> None:
        """Adds the line of a step, which it names as `step`; the first one says where the training goes on."""
        if not self._has_begun:
            self._begin(line["step"])
        if self._appends:
            with open(self._folder.file(HISTORY), "ab") as file:
                file.write(_encoded(line))
        else:
            self._kept += _encoded(line)

    def save(self) -> None:
        """Makes sure that all lines so far can be read."""
        if self._kept:
            self._folder.write_bytes(HISTORY, bytes(self._kept))

    def _begin(self, step: int) -> None:
        before = read_history(self._folder) if self._resumed and self._folder.exists(HISTORY) else []
        with reading(self._folder.file(HISTORY), expected="a line of JSON for every step"):
            kept = [line for line in before if line["step"] < step]
        if self._appends:
            # Moved into its place, so that a crash in between loses no step.
            write_history(self._folder, kept)
        else:
            self._kept += b"".join(map(_encoded, kept))
        self._has_begun = True


class HistoryReader:
    """Reads a history that is being written, from where the last look ended.

    Args:
        folder: of the history.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._offset, self._last_step = 0, -1

    def new_steps(self) -> list[dict[str, Any]]:
        """The lines of steps that come after those of earlier looks; none where there is no history yet."""
        self._folder.fs.invalidate_cache(self._folder.path)
        if not self._folder.exists(HISTORY):
            return []
        try:
            lines = self._read_on()
            goes_on = lines[0]["step"] == self._last_step + 1 if lines else self._size() >= self._offset
        except (ValueError, KeyError, TypeError):
            # Not at the beginning of a line any more.
            goes_on = False
        if not goes_on:
            # A resumed training dropped lines, and the new ones end elsewhere.
            self._offset = 0
            lines = [line for line in self._read_on() if line["step"] > self._last_step]
        if lines:
            self._last_step = lines[-1]["step"]
        return lines

    def _read_on(self) -> list[dict[str, Any]]:
        if self._size() <= self._offset:
            return []
        data: bytes = self._folder.fs.cat_file(self._folder.file(HISTORY), start=self._offset)
        lines = _decoded(data)
        self._offset += data.rfind(b"\n") + 1
        return lines

    def _size(self) -> int:
        return int(self._folder.fs.size(self._folder.file(HISTORY)))

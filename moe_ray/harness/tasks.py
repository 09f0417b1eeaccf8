"""Tasks of harnesses by their names: which harness, which files they are made of, and what they are called in a folder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moe_ray.config.harness import HarnessConfig
from moe_ray.errors import InputError
from moe_ray.harness.extra import require, version_of
from moe_ray.storage.fingerprint import content_hash

Harness = Literal["lm_eval", "inspect_ai"]

_OF_A_TASK = {".yaml", ".yml", ".py", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt"}
_MOST_BYTES = 100 * 10**6


@dataclass(frozen=True, kw_only=True)
class HarnessTask:
    """A task.

    Attributes:
        harness: whose it is.
        name: as the harness is asked for it; files are absolute.
    """

    harness: Harness
    name: str

    @property
    def file(self) -> Path | None:
        """The file that it is defined in; None = it is the harness's own."""
        path, _, _ = self.name.partition("@")
        return Path(path) if path.endswith((".yaml", ".yml", ".py")) else None

    @property
    def title(self) -> str:
        """What people are shown: of a file its name without folder and ending, and of one of its tasks that one's."""
        if self.file is None:
            return self.name
        of_file = self.name.partition("@")[2]
        return of_file or self.file.stem

    @property
    def folder(self) -> str:
        """What its folder is called; no two tasks have the same."""
        return f"{self.harness}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', self.title)}-{content_hash(self.name)[:6]}"

    def version(self) -> dict[str, str]:
        """What its results depend on beside the model: the harness's version, and of a file all that is beside it."""
        known = {"package": version_of(self.harness)}
        return known if self.file is None else known | {"files": content_hash(list(_contents(self.file)))}


def _contents(file: Path) -> Iterator[Any]:
    """Names and hashes of the files that a task's file may refer to: those in its folder."""
    beside = sorted(path for path in file.parent.iterdir() if path.is_file() and path.suffix in _OF_A_TASK)
    for path in beside:
        size = path.stat().st_size
        yield (
            path.name,
            content_hash(path.read_bytes().hex()) if size <= _MOST_BYTES else [size, path.stat().st_mtime_ns],
        )


def tasks_of(config: HarnessConfig) -> list[HarnessTask]:
    """The configured tasks.

    Raises:
        InputError: a harness is not installed, or a task's file does not exist.
    """
    found: list[HarnessTask] = []
    named: tuple[tuple[Harness, str, tuple[str, ...]], ...] = (
        ("lm_eval", "lm_eval", config.lm_eval),
        ("inspect_ai", "inspect", config.inspect),
    )
    for harness, setting, names in named:
        if names:
            require(harness, f"harness.{setting}")
        for name in names:
            task = HarnessTask(harness=harness, name=name)
            if task.file is not None:
                if not task.file.expanduser().is_file():
                    raise InputError(f"harness.{setting}: nothing at {str(task.file)!r}; give the file of a task")
                _, at, of_file = name.partition("@")
                task = HarnessTask(harness=harness, name=f"{task.file.expanduser().absolute()}{at}{of_file}")
            found.append(task)
    return found

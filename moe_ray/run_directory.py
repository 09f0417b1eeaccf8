"""What a run directory holds, read when it is first asked for; stages that were not run are None."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd

from moe_ray.config.identify import IdentifyConfig
from moe_ray.config.io import load_config
from moe_ray.config.run import Config
from moe_ray.errors import InputError
from moe_ray.experts import ExpertMasks
from moe_ray.identification.identify import identify
from moe_ray.identification.mask_files import read_masks
from moe_ray.identification.overlap import categories_of_batches, expert_categories
from moe_ray.routing.count_store import read_counts
from moe_ray.routing.counts import RoutingCounts
from moe_ray.storage.folder import MANIFEST, Folder

_ORDER = ("batches", "routing", "unsafe_experts", "evaluation_before", "experts", "evaluation_after")


@dataclass(frozen=True)
class FinishedRun:
    """A run directory in which identification is finished."""

    folder: Folder

    @classmethod
    def open(cls, url: str) -> FinishedRun:
        """Raises InputError when the place does not exist or identification is not finished there."""
        fs, path = fsspec.url_to_fs(url)
        if not fs.exists(f"{path}/unsafe_experts/masks.npz"):
            raise InputError(
                f"{url!r} holds no unsafe_experts/masks.npz; give the run_dir of a run that finished identification "
                "(python workflows/identify.py)"
            )
        return cls(Folder.open(url))

    @cached_property
    def config(self) -> Config:
        """The run's configuration."""
        with tempfile.TemporaryDirectory() as work:
            Path(work, "config.yaml").write_bytes(self.folder.read_bytes("config.yaml"))
            return load_config(str(Path(work, "config.yaml")))

    @cached_property
    def selection(self) -> IdentifyConfig:
        """The settings that its experts were selected with: after a sweep the winner's, not those of `config`."""
        manifest = self.manifest("unsafe_experts")
        stored = {} if manifest is None else manifest["inputs"].get("selection", {})
        settings: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in stored.items()}
        return IdentifyConfig(**settings) if settings else self.config.identify

    @cached_property
    def masks(self) -> ExpertMasks:
        """Its selection."""
        return read_masks(self.folder.sub("unsafe_experts"))

    @cached_property
    def batches(self) -> pd.DataFrame:
        """Its training examples."""
        return self.folder.sub("batches").read_frame("batches.parquet")

    @cached_property
    def categories(self) -> dict[int, str]:
        """Per `batch_idx` the category of its unsafe examples, or `mixed`."""
        return categories_of_batches(self.batches)

    @cached_property
    def counts(self) -> RoutingCounts:
        """The routing counts of its batches that have masks."""
        counts = read_counts(self.folder.sub("routing").sub("counts"))
        return counts.take(np.isin(counts.batch_idx, self.masks.batch_idx))

    @cached_property
    def risk(self) -> pd.DataFrame:
        """Its risk table; statistics that it lacks are computed from the counts."""
        risk = self.folder.sub("unsafe_experts").read_frame("risk_differences.parquet")
        if "p_maxt" in risk:
            return risk
        return identify(self.counts, self.selection, seed=self.config.seed, pairs=self.pairs)

    @property
    def pairs(self) -> pd.Series:
        """Per row of the counts, the pair of its example."""
        keys = ["batch_idx", "in_batch_idx"]
        rows = pd.DataFrame({name: getattr(self.counts, name) for name in keys})
        return rows.merge(self.batches[[*keys, "pair"]], on=keys, how="left")["pair"]

    @cached_property
    def by_category(self) -> pd.DataFrame:
        """Experts of each category."""
        return expert_categories(self.risk, self.masks, self.categories)

    @cached_property
    def summary(self) -> dict[str, Any] | None:
        """`summary.json`."""
        return self.folder.read_json("summary.json") if self.folder.exists("summary.json") else None

    @cached_property
    def history(self) -> pd.DataFrame | None:
        """The training's steps, a row each."""
        if not self.folder.exists("experts/history.jsonl"):
            return None
        lines = self.folder.read_bytes("experts/history.jsonl").decode().splitlines()
        steps = pd.DataFrame([json.loads(line) for line in lines])
        return steps if len(steps) else None

    def answers(self, when: str) -> pd.DataFrame | None:
        """Held-out answers `before` or `after` the repair."""
        if not self.folder.exists(f"evaluation_{when}/answers.parquet"):
            return None
        return self.folder.sub(f"evaluation_{when}").read_frame("answers.parquet")

    @cached_property
    def baselines(self) -> tuple[pd.DataFrame, str] | None:
        """The comparison with baselines, a row per arm, and what it says in words."""
        if not self.folder.exists("baselines/comparison.parquet"):
            return None
        folder = self.folder.sub("baselines")
        return folder.read_frame("comparison.parquet"), str(folder.read_json("verdict.json"))

    @cached_property
    def validation_labels(self) -> pd.Series | None:
        """The labels of its validation examples."""
        if not self.folder.exists("batches/validation.parquet"):
            return None
        return self.folder.sub("batches").read_frame("validation.parquet")["label"]

    @cached_property
    def trials(self) -> pd.DataFrame | None:
        """The trials of its sweep, the best first."""
        if not self.folder.exists("sweep/trials.parquet"):
            return None
        return self.folder.sub("sweep").read_frame("trials.parquet")

    @property
    def stages(self) -> list[str]:
        """Finished stages, those that every run has in their order, the others before them."""
        found = [name for name in self.folder.names() if self.folder.exists(f"{name}/{MANIFEST}")]
        return sorted(found, key=lambda name: _ORDER.index(name) if name in _ORDER else -1)

    def manifest(self, stage: str) -> dict[str, Any] | None:
        """A finished stage's inputs, notes and environment."""
        if not self.folder.exists(f"{stage}/{MANIFEST}"):
            return None
        manifest: dict[str, Any] = self.folder.read_json(f"{stage}/{MANIFEST}")
        return manifest


def open_run(url: str) -> FinishedRun:
    """The run directory at a path or URL; raises InputError where there is none that finished identification."""
    return FinishedRun.open(url)

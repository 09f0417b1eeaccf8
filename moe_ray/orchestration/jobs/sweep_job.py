"""What every trial of a sweep needs to know, and the records that trials leave for the sweep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from moe_ray.config.model import ModelConfig
from moe_ray.config.run import Config
from moe_ray.run_directory import RECORDS, SWEEP, TRIAL_FOLDERS
from moe_ray.storage.fingerprint import content_hash
from moe_ray.storage.folder import Folder


@dataclass(frozen=True, kw_only=True)
class SweepJob:
    """What every trial needs to know; plain values but for `leases`.

    Attributes:
        model: the base model.
        config: of the run; a trial's settings go on top.
        run_url: the run directory.
        inputs: what all trials depend on, beside their settings, as plain values.
        sources: what learned experts depend on, beside masks, settings and validation examples, as plain values.
        neutral_texts: whose loss shows what was forgotten.
        leases: from `start_leases`, where trials run at the same time.
        memory: bytes of the weights in a trial on the CPU, which Ray is asked for; 0 = nothing is asked for.
    """

    model: ModelConfig
    config: Config
    run_url: str
    inputs: Mapping[str, Any]
    sources: Mapping[str, Any] = field(default_factory=dict)
    neutral_texts: tuple[str, ...] = ()
    leases: Any = None
    memory: int = 0

    @property
    def folder(self) -> Folder:
        """Of the sweep."""
        return Folder.open(self.run_url).sub(SWEEP)

    @property
    def trials(self) -> Folder:
        """One folder per trial, of this sweep and of those before it."""
        return self.folder.sub(TRIAL_FOLDERS)

    @property
    def records(self) -> Folder:
        """One file per trial of this sweep."""
        return self.folder.sub(RECORDS)


def plain_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's settings as Ray Tune draws them, in plain values."""
    return {key: value.item() if hasattr(value, "item") else value for key, value in config.items()}


def record_name(settings: Mapping[str, Any]) -> str:
    """The name of a trial's record among those of the sweep."""
    return f"{content_hash(dict(settings))}.json"


def read_trials(records: Folder) -> pd.DataFrame:
    """All trials of a sweep with a record, one row each: settings by dotted key, then what came of them.

    The column `state` is `finished`, `stopped` (by the scheduler, before its last epoch) or `failed` (`message` tells why);
    `trained_by` is the trial whose training it is: another's where masks and training settings are the same.
    """
    rows = []
    for name in records.names():
        if name.endswith(".json") and not name.startswith("."):
            record = records.read_json(name)
            settings, epochs = record.pop("settings"), record.pop("epochs")
            record.pop("metrics", None)
            rows.append({**settings, "epochs": len(epochs), **record})
    return pd.DataFrame(rows)

"""A trial's training, kept with everything it depends on, so that a run with the same inputs takes it instead of training.

A trial trains as the `finetune` stage does, with the same function on the same batches in the same order, so the adapter
that it leaves has the bytes that the stage would write.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from moe_ray.config.effects import settings_affecting
from moe_ray.config.run import Config
from moe_ray.finetuning.adapter_files import ADAPTER_FILES, copy_adapter
from moe_ray.finetuning.fine_tune import FineTuned
from moe_ray.finetuning.history import HISTORY, read_history, write_history
from moe_ray.storage.folder import Folder

_KEPT = "training.json"
"""Written last, removed first: without it a folder keeps no training."""

FILES_OF_TRAINING = (_KEPT, *reversed(ADAPTER_FILES), HISTORY)
"""What `forget_training` takes out of a trial's folder, in this order."""


def training_settings(config: Config) -> dict[str, Any]:
    """The settings `finetune.*` that affect the weights.

    With `finetune.batches_per_step=0` a step takes as many batches as there are workers, which does matter.
    """
    settings = {
        key: value for key, value in settings_affecting(config, "weights").items() if key.startswith("finetune.")
    }
    batches = config.finetune.batches_per_step or max(1, config.finetune.num_workers)
    return settings | {"finetune.batches_per_step": batches}


def keep_training(folder: Folder, inputs: Mapping[str, Any], adapter: str | Path, tuned: FineTuned) -> None:
    """Keeps a training in a trial's folder; one that was resumed is not kept, since it knows only its last steps.

    Args:
        folder: of the trial.
        inputs: everything the learned experts depend on, as the `finetune` stage names it.
        adapter: local folder of the learned experts.
        tuned: what the training did.
    """
    if not tuned.reports or tuned.reports[0].step:
        return
    forget_training(folder)
    copy_adapter(Folder.open(str(adapter)), folder)
    write_history(folder, [report.as_dict() for report in tuned.reports])
    numbers = {field.name: getattr(tuned, field.name) for field in fields(tuned) if field.name != "reports"}
    folder.write_json(_KEPT, {"inputs": dict(inputs), "notes": numbers})


def forget_training(folder: Folder) -> None:
    """Removes the training that a trial's folder keeps, if there is one; what the trial measured stays."""
    for name in FILES_OF_TRAINING:
        folder.remove(name)


def take_training(trials: Folder, inputs: Mapping[str, Any], out: Folder) -> dict[str, Any] | None:
    """Copies a kept training with equal inputs; returns its notes, None where there is none.

    Args:
        trials: the folder with the trials' folders.
        inputs: everything the learned experts depend on.
        out: gets the learned experts and the history.
    """
    wanted = json.loads(json.dumps(dict(inputs)))
    for name in trials.names():
        if not trials.exists(f"{name}/{_KEPT}"):
            continue
        kept = trials.read_json(f"{name}/{_KEPT}")
        if kept["inputs"] == wanted:
            folder = trials.sub(name)
            write_history(out, read_history(folder))
            copy_adapter(folder, out)
            return {**kept["notes"], "trained_by": name}
    return None

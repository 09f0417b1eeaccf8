"""Training checkpoints in a folder of one's own: the newest finished one is kept, and a training goes on from it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from moe_ray.errors import InputError
from moe_ray.finetuning.callbacks import Callback
from moe_ray.finetuning.checkpoint import save_checkpoint, steps_done
from moe_ray.finetuning.step_report import StepReport
from moe_ray.finetuning.trainer import MaskedTrainer

_PREFIX = "step_"


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint with most steps behind it; None = there is none that was written to its end."""
    found = sorted(Path(folder).glob(f"{_PREFIX}*"), reverse=True)
    return next((path for path in found if _is_finished(path)), None)


def _is_finished(path: Path) -> bool:
    try:
        return steps_done(path) >= 0
    except InputError:
        return False


class KeepCheckpoints(Callback):
    """Saves a checkpoint at the end of each epoch, or every so many steps, and removes the one before.

    Args:
        folder: made if missing.
        every: steps; 0 = at the end of each epoch.
        told: callbacks to tell of each checkpoint.
    """

    def __init__(self, folder: str | Path, *, every: int = 0, told: Sequence[Callback] = ()) -> None:
        self._folder, self._every, self._told = Path(folder), every, tuple(told)

    def on_step_end(self, trainer: MaskedTrainer, report: StepReport, /) -> None:
        """Saves where one is due."""
        if trainer.next_step % (self._every or trainer.steps_per_epoch) and not trainer.is_finished:
            return
        folder = self._folder / f"{_PREFIX}{trainer.next_step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        save_checkpoint(trainer, folder)
        if trainer.world_size > 1:
            dist.barrier()  # the older one stays until the parts of all workers are there
        if trainer.rank == 0:
            for older in self._folder.glob(f"{_PREFIX}*"):
                if older != folder:
                    shutil.rmtree(older)
        for callback in self._told:
            callback.on_checkpoint(trainer, folder)

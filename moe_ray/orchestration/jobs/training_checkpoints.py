"""Training checkpoints in the run directory, for a training that runs without Ray Train."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_ray.finetuning.checkpoint import CHECKPOINT_FILES, save_checkpoint
from moe_ray.finetuning.trainer import MaskedTrainer
from moe_ray.storage.folder import Folder

CHECKPOINTS = "checkpoints"
"""Their folder, in that of the training."""


class StoredCheckpoints:
    """The last checkpoint of a training; an older one is removed when a newer one is whole.

    Args:
        folder: which holds nothing else.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def save(self, trainer: MaskedTrainer) -> None:
        """Stores the trainer's state."""
        older = self.folder.names()
        name = f"step-{trainer.next_step:09d}"
        target = self.folder.sub(name)
        with tempfile.TemporaryDirectory() as local:
            save_checkpoint(trainer, local)
            for file in CHECKPOINT_FILES:
                target.write_bytes(file, Path(local, file).read_bytes())
        for step in older:
            if step != name and self.folder.exists(f"{step}/{CHECKPOINT_FILES[0]}"):
                self.folder.sub(step).delete()

    @contextmanager
    def latest(self) -> Iterator[str | None]:
        """A local folder with the last whole checkpoint; None = there is none."""
        for step in reversed(self.folder.names()):
            if self.folder.exists(f"{step}/{CHECKPOINT_FILES[-1]}"):
                stored = self.folder.sub(step)
                with tempfile.TemporaryDirectory() as local:
                    for file in CHECKPOINT_FILES:
                        Path(local, file).write_bytes(stored.read_bytes(file))
                    yield local
                return
        yield None

    def delete(self) -> None:
        """Removes them all."""
        self.folder.delete()

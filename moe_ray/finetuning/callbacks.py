"""Code of one's own while experts are trained: at the start, after steps, epochs and checkpoints, and at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moe_ray.finetuning.step_report import StepReport
from moe_ray.finetuning.trainer import MaskedTrainer


class Callback:
    """What a training calls; every method does nothing until a subclass says what.

    `trainer.stop()` ends the training after the step. What a callback raises ends it at once, and nothing is saved.
    """

    def on_train_begin(self, trainer: MaskedTrainer, /) -> None:
        """Before the first step; `trainer.next_step` is above 0 where the training is resumed."""

    def on_step_end(self, trainer: MaskedTrainer, report: StepReport, /) -> None:
        """A step's update is in force."""

    def on_epoch_end(self, trainer: MaskedTrainer, reports: Sequence[StepReport], /) -> None:
        """All batches were trained once more; `reports` are the epoch's steps, without those before a resumption."""

    def on_checkpoint(self, trainer: MaskedTrainer, folder: Path, /) -> None:
        """The folder holds a finished training checkpoint; it is removed when there is a newer one."""

    def on_train_end(self, trainer: MaskedTrainer, reports: Sequence[StepReport], /) -> None:
        """After the last step, with the learned weights in place; `reports` are those of all steps run now."""


class Callbacks(Callback):
    """Several callbacks, told in their order.

    Args:
        callbacks: to tell.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = tuple(callbacks)
        self._of_epoch: list[StepReport] = []

    def on_train_begin(self, trainer: MaskedTrainer, /) -> None:
        """Tells all."""
        for callback in self._callbacks:
            callback.on_train_begin(trainer)

    def on_step_end(self, trainer: MaskedTrainer, report: StepReport, /) -> None:
        """Tells all of the step, and of the epoch that it ended."""
        self._of_epoch.append(report)
        for callback in self._callbacks:
            callback.on_step_end(trainer, report)
        if trainer.next_step % trainer.steps_per_epoch == 0:
            for callback in self._callbacks:
                callback.on_epoch_end(trainer, tuple(self._of_epoch))
            self._of_epoch.clear()

    def on_checkpoint(self, trainer: MaskedTrainer, folder: Path, /) -> None:
        """Tells all."""
        for callback in self._callbacks:
            callback.on_checkpoint(trainer, folder)

    def on_train_end(self, trainer: MaskedTrainer, reports: Sequence[StepReport], /) -> None:
        """Tells all."""
        for callback in self._callbacks:
            callback.on_train_end(trainer, reports)

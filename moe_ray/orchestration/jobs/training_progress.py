"""How far a training is: a bar or lines for who waits, and lines in a log file, both from the history that it writes.

Workers do not print their steps: what a Ray worker prints comes with a prefix and from several processes at once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from moe_ray.finetuning.history import PLANNED_STEPS, HistoryReader
from moe_ray.orchestration.cluster.progress import Meter, progress
from moe_ray.report.format import decimal, loss
from moe_ray.storage.folder import Folder

TRAINING_LOG = "training.log"
"""File of the learned experts' folder."""

_SECONDS_BETWEEN_LOOKS = 0.5


@contextmanager
def training_shown(folder: Folder, *, log_every: int, what: str = "fine-tuning") -> Iterator[None]:
    """Shows the steps of the training that writes its history to `folder` meanwhile.

    In an object store, where nothing can be appended, steps come with every checkpoint.

    Args:
        folder: of the history; gets the log file, which holds the steps before a resume too.
        log_every: steps between two lines of the log file; the last step has one too.
        what: the work.
    """
    with progress(what, None, unit="steps") as meter:
        watcher = _Watcher(folder, meter, log_every)
        watcher.start()
        try:
            yield
        finally:
            watcher.end()


class _Watcher:
    """Looks for new steps in a thread of its own."""

    def __init__(self, folder: Folder, meter: Meter, log_every: int) -> None:
        self._history, self._log = HistoryReader(folder), _Log(folder)
        self._meter, self._log_every = meter, log_every
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_looking, name="training progress", daemon=True)

    def start(self) -> None:
        """Begins to look."""
        self._thread.start()

    def end(self) -> None:
        """Looks for the last time."""
        self._ended.set()
        self._thread.join()
        self._look()

    def _keep_looking(self) -> None:
        while not self._ended.wait(_SECONDS_BETWEEN_LOOKS):
            self._look()

    def _look(self) -> None:
        steps = self._history.new_steps()
        if not steps:
            return
        due = [step for step in steps if _is_due(step, self._log_every)]
        self._log.add([step_in_words(step) for step in due])
        last = steps[-1]
        note = f"loss {decimal(last['loss'], 3)}, {last['tokens_per_second']:,.0f} tokens/s"
        self._meter.show(last["step"] + 1, total=last.get(PLANNED_STEPS), note=note)


def _is_due(step: Mapping[str, Any], log_every: int) -> bool:
    number = step["step"] + 1
    return number == 1 or number % log_every == 0 or number == step.get(PLANNED_STEPS) or bool(step.get("warning"))


def step_in_words(step: Mapping[str, Any]) -> str:
    """A step of the history as a line."""
    names = ", ".join(str(batch["batch_idx"]) for batch in step["batches"])
    line = (
        f"step {step['step'] + 1}/{step.get(PLANNED_STEPS, '?')}  epoch {step['epoch'] + 1}  batch_idx {names}  "
        f"experts {step['num_experts']}  loss {loss(step['loss'])}  {step['tokens_per_second']:.0f} tokens/s"
    )
    if step.get("validation_loss") is not None:
        line += f"  validation loss {loss(step['validation_loss'])}"
    return f"{line}  WARNING {step['warning']}" if step.get("warning") else line


class _Log:
    """The log file: begun anew, since a history that is gone on with is read from its first step."""

    def __init__(self, folder: Folder) -> None:
        self._folder, self._lines = folder, list[str]()
        self._appends = isinstance(folder.fs, LocalFileSystem)
        folder.remove(TRAINING_LOG)

    def add(self, lines: list[str]) -> None:
        """Adds lines."""
        if not lines:
            return
        text = "".join(f"{line}\n" for line in lines)
        if self._appends:
            with open(self._folder.file(TRAINING_LOG), "a", encoding="utf-8") as file:
                file.write(text)
        else:
            self._lines += lines
            self._folder.write_bytes(TRAINING_LOG, "".join(f"{line}\n" for line in self._lines).encode())

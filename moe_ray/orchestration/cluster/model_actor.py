"""A process that holds a model for as long as a run needs it, and does one kind of work on it after another.

The driver starts such processes before it has imported torch itself, so this module leaves that to them.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from moe_ray.config.model import ModelConfig
from moe_ray.orchestration.cluster.model_group import ModelGroup

if TYPE_CHECKING:
    from moe_ray.orchestration.cluster.model_process import ModelHolder

LoadModel = Callable[[ModelConfig, int], "ModelHolder"]
T = TypeVar("T")


class ModelWork:
    """What a model process does with the blocks of one job.

    Args:
        holder: the model, which is the base model while no work is in force.
        job: plain values.
    """

    def __init__(self, holder: ModelHolder, job: Any) -> None:
        self.holder, self.job = holder, job

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """What is attached to the model, or changed in it, while this work is in force; gone bit for bit afterwards."""
        yield

    def __call__(self, block: Any) -> Any:
        """Does one block; returns what the driver is told of it."""
        raise NotImplementedError


class ModelActor:
    """The process, as Ray runs it.

    Every call names its work, so a process that Ray has started anew does a repeated call as the one before it would have.
    The model is not loaded in the constructor: an error there would end the process without a word of what is wrong.

    Args:
        model: which one.
        load: makes the holder of the model, of it and of how many processes share this node's cores; None = `ModelHolder`.
        others: arguments of `ray.remote` for each of the processes that hold the model together with this one, where its
            `num_shards` says that some do.
    """

    def __init__(
        self, model: ModelConfig, load: LoadModel | None = None, others: Mapping[str, Any] | None = None
    ) -> None:
        self._model, self._load = model, load
        self._group = None if others is None else ModelGroup(model, others)
        self._holder: ModelHolder | None = None
        self._lock = threading.Lock()
        self._key, self._opened, self._threads = "", ExitStack(), 1
        self._work: ModelWork | None = None
        # What takes longest is done before there has to be a checkpoint.
        importlib.import_module("moe_ray.orchestration.cluster.model_process")

    def load(self) -> int:
        """Loads the model unless it is there; returns the process's id."""
        self._attended(self._load_once)
        return os.getpid()

    def _load_once(self) -> None:
        with self._lock:
            self._loaded(1)

    def _attended(self, work: Callable[[], T]) -> T:
        return work() if self._group is None else self._group.attend(work)

    def do(self, key: str, kind: type[ModelWork], job: Any, num_processes: int, block: Any) -> Any:
        """Does one block of a job.

        Args:
            key: names the job; a new one ends the work on the job before it.
            kind: what is done.
            job: its plain values.
            num_processes: how many processes work on the job, on all nodes together.
            block: what is done now.
        """
        return self._attended(partial(self._do, key, kind, job, num_processes, block))

    def _do(self, key: str, kind: type[ModelWork], job: Any, num_processes: int, block: Any) -> Any:
        with self._lock:
            work = self._in_force(key, kind, job, num_processes)
        import torch

        # OpenMP counts the threads of each calling thread on its own.
        torch.set_num_threads(self._threads)
        return work(block)

    def rest(self, key: str) -> None:
        """Ends the work on a job, unless another one has begun."""
        self._attended(partial(self._rest, key))

    def _rest(self, key: str) -> None:
        with self._lock:
            if key == self._key:
                self._close()

    def _in_force(self, key: str, kind: type[ModelWork], job: Any, num_processes: int) -> ModelWork:
        if key != self._key or self._work is None:
            self._close()
            work = kind(self._loaded(num_processes), job)
            self._opened.enter_context(work.in_force())
            self._key, self._work = key, work
        return self._work

    def _loaded(self, num_processes: int) -> ModelHolder:
        from moe_ray.orchestration.cluster.model_process import ModelHolder
        from moe_ray.orchestration.cluster.node_share import processes_on_this_node
        from moe_ray.threads import threads_of_process

        num_on_node = processes_on_this_node(num_processes)
        if self._holder is None:
            load = self._load or (ModelHolder if self._group is None else self._group.load)
            self._holder = load(self._model, num_on_node)
        self._threads = threads_of_process(num_on_node, self._holder.model.num_parameters())
        return self._holder

    def _close(self) -> None:
        opened, self._opened, self._key, self._work = self._opened, ExitStack(), "", None
        try:
            opened.close()
        except BaseException:
            # A model that was not put back is nobody's base model: it is loaded anew.
            self._holder = None
            raise

"""The model processes of a run: started once, and handed from stage to stage.

Loading a model takes longer than most of what is then done with it, so routing capture, answers and training on one CPU
are served by the same Ray actors. Blocks are handed out by a loop of this module and not by Ray Data, whose pools live as
long as one data set: actors of an earlier stage could only be reached through tasks that wait for them, one process more for
each. Ray Data still drives what holds no model, or another one: identification and judges.
"""

from __future__ import annotations

import queue
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Any, Self

import ray

from moe_ray.config.model import ModelConfig
from moe_ray.errors import InputError, OutsideFailed
from moe_ray.orchestration.cluster.model_actor import LoadModel, ModelWork
from moe_ray.orchestration.cluster.placement import ANYWHERE, Placement
from moe_ray.orchestration.cluster.pool_process import PoolProcess, start_process
from moe_ray.orchestration.cluster.ray_session import (
    all_cpus,
    free_resources,
    has_room_to_grow,
    require_cpus,
    require_gpus,
    result_of,
    wait_until_free,
)

_NO_MORE = object()


class ModelPool:
    """Processes that each hold the base model; none is started before it is needed or asked for.

    Where the model's `num_shards` is more than 1, a process is the leader of a group of so many, see `ModelGroup`.

    Args:
        model: which one.
        memory: bytes that its weights, or its part of them, take in a process on the CPU, which Ray is asked for; 0 =
            nothing is asked for.
        load: see `ModelActor`.
        placement: on which nodes.

    As a context it leaves no process behind.

    Attributes:
        seconds_waited: how long work has waited for the first process to have its model.
    """

    def __init__(
        self,
        model: ModelConfig,
        *,
        memory: int = 0,
        load: LoadModel | None = None,
        placement: Placement = ANYWHERE,
    ) -> None:
        self.model, self.memory, self.placement, self._load = model, memory, placement, load
        self.seconds_waited = 0.0
        self._gpus = 0.0
        self._processes: list[PoolProcess] = []

    @property
    def size(self) -> int:
        """How many copies of the model there are, also those that are being started."""
        return len(self._processes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(waits=error is None)

    def start(self, num_processes: int, *, gpus: float = 0.0) -> None:
        """Has at least so many processes start, or stay; does not wait for them, and needs no checkpoint yet.

        Args:
            num_processes: their least number.
            gpus: of each; processes with another number of GPUs are given back first.
        """
        if gpus != self._gpus:
            self.release()
            self._gpus = gpus
        while len(self._processes) < num_processes:
            self._start_one()

    def _start_one(self) -> None:
        self._processes.append(
            start_process(self.model, self._load, placement=self.placement, gpus=self._gpus, memory=self.memory)
        )

    def load(self) -> None:
        """Has the processes load the model; does not wait for them."""
        for process in self._processes:
            if process.loading is None:
                # A process that ends while it loads would end again: it is tried once more, and not for ever.
                process.loading = process.actor.load.options(max_task_retries=1).remote()

    @contextmanager
    def working(
        self,
        blocks: Iterable[Any],
        kind: type[ModelWork],
        job: Any,
        *,
        what: str,
        num_processes: int = 1,
        max_processes: int = 0,
        gpus: float = 0.0,
        overlaps: bool = False,
        resumes: bool = False,
    ) -> Iterator[Iterator[Any]]:
        """Has processes work on the blocks of a job; afterwards they hold the base model again and stay.

        Args:
            blocks: one call each; the next is asked for when a process is free, so it may follow what came back so far.
            kind: what is done with a block.
            job: plain values for it; small, since every call carries them.
            what: the work, for errors.
            num_processes: how many work on it; those that the pool has more stay idle.
            max_processes: more are started, up to this many, while there is work and room; 0 = always `num_processes`.
            gpus: of each process: a fraction of one, one, or several.
            overlaps: a process is called for its next block while it works on one; the work must be thread-safe.
            resumes: a call that is repeated goes on where the one before it stopped; it is repeated once.

        Yields:
            what came back for a block, one after another, in any order of blocks.

        Raises:
            InputError: a local Ray has too few CPUs, and the processes would wait for ever.
            OutsideFailed: of work that resumes, a process ended, and so did the one in its place.
        """
        each = self.model.num_shards
        require_cpus(num_processes * each, what)
        require_gpus(num_processes * each * gpus, what)
        self.placement.require(gpus, what)
        self.start(num_processes, gpus=gpus)
        key, most = uuid.uuid4().hex, max(num_processes, max_processes)

        # A block that ends its process is tried again until crash markers have found what is deadly in it. What resumes has
        # none: what ended two processes one after the other would end every one.
        options = {"max_task_retries": 1 if resumes else -1}

        def call(process: PoolProcess, block: Any) -> Any:
            return process.actor.do.options(**options).remote(key, kind, job, most, block)

        try:
            yield self._results(iter(blocks), call, most, what=what, at_once=2 if overlaps else 1)
        except BaseException:
            # Calls that nobody waits for any more may still be at work on the model.
            self.release()
            raise
        for process in self._processes[num_processes:]:
            if not process.is_ready:  # and would wait for a place until the run ends
                process.end()
                self._processes.remove(process)
        for process in self._processes:
            process.actor.rest.remote(key)

    def _results(self, blocks: Iterator[Any], call: Any, most: int, *, what: str, at_once: int) -> Iterator[Any]:
        began = time.perf_counter()
        # What is done is put here when it is there, so that the driver never looks through all the calls in flight.
        done: queue.SimpleQueue[tuple[PoolProcess, Any]] = queue.SimpleQueue()

        def notify(process: PoolProcess, reference: Any) -> None:
            reference.future().add_done_callback(lambda _: done.put((process, reference)))

        watched: set[PoolProcess] = set()
        busy: Counter[PoolProcess] = Counter()
        has_more = True
        while True:
            self.load()
            ready = [process for process in self._processes[:most] if process.is_ready]
            loading = [process for process in self._processes[:most] if not process.is_ready]
            # A second block for one process only when every other one has its first.
            for depth in range(at_once):
                for process in ready:
                    if has_more and busy[process] == depth:
                        block = next(blocks, _NO_MORE)
                        has_more = block is not _NO_MORE
                        if has_more:
                            notify(process, call(process, block))
                            busy[process] += 1
            if not has_more and not busy.total():
                return
            if has_more and not loading and len(self._processes) < most and self._has_room():
                self._start_one()
                continue
            for process in loading:
                if process not in watched:
                    watched.add(process)
                    notify(process, process.loading)
            process, reference = done.get()
            result = self._worked(reference, what) if process.is_ready else self._loaded(reference)
            if not process.is_ready:
                if not ready:
                    self.seconds_waited += time.perf_counter() - began
                process.is_ready = True
            else:
                busy[process] -= 1
                yield result

    def _has_room(self) -> bool:
        return has_room_to_grow(self.model.num_shards, self.model.num_shards * self._gpus)

    def _worked(self, reference: Any, what: str) -> Any:
        try:
            return result_of(reference)
        except ray.exceptions.RayActorError as error:
            from moe_ray.orchestration.cluster.model_memory import memory_in_words

            raise OutsideFailed(
                f"{what}: a model process ended twice while it worked, as it does where memory runs out: "
                f"{memory_in_words(self.model, len(self._processes))}; run the same command again when there is more, and "
                "what is done already stays"
            ) from error

    def _loaded(self, reference: Any) -> Any:
        """What loading returned.

        Raises:
            InputError: the process ended while it loaded, and so did the one in its place.
        """
        try:
            return result_of(reference)
        except ray.exceptions.RayActorError as error:
            from moe_ray.orchestration.cluster.model_memory import memory_in_words

            raise InputError(
                f"a model process ended twice while it loaded {self.model.path!r}, as it does where memory runs out: "
                f"{memory_in_words(self.model, len(self._processes))}; use fewer processes (capture.num_actors, "
                "evaluate.num_actors), model.dtype=bfloat16, or a node with more memory"
            ) from error

    def make_room(self, *, cpus: float = 0.0, gpus: float = 0.0) -> None:
        """Gives the processes back where so many CPUs are not free beside them, or where they hold GPUs and some are wanted.

        GPUs that are free in all say little: an actor needs its share on one card.
        """
        if self._processes and ((gpus and self._gpus) or free_resources("CPU") < cpus):
            self.release()

    def make_room_for_tasks(self) -> None:
        """Gives the processes back where they leave fewer than half of the CPUs to work that takes all it finds."""
        if self._processes:
            self.make_room(cpus=all_cpus() / 2)

    def release(self) -> None:
        """Ends the processes, and waits until their GPUs and CPUs are free again."""
        self._end(waits=True)

    def _end(self, *, waits: bool) -> None:
        # A process that waits for a place holds nothing; one that has not loaded its model yet is not waited for.
        loading = [process.loading for process in self._processes if process.loading is not None]
        loaded = ray.wait(loading, num_returns=len(loading), timeout=0)[0] if loading and waits else []
        given_back = len(loaded) * self.model.num_shards
        free = (
            {
                "CPU": free_resources("CPU") + given_back,
                "GPU": free_resources("GPU") + given_back * self._gpus,
            }
            if loaded
            else {}
        )
        for process in self._processes:
            process.end()
        self._processes = []
        if free:
            wait_until_free(free, "model processes")


def pool_for(model: ModelConfig, pool: ModelPool | None) -> AbstractContextManager[ModelPool]:
    """The run's pool, which stays; or where there is none, one for the length of the context."""
    return ModelPool(model) if pool is None else nullcontext(pool)

"""What the processes of a group hold: each its part of the model, the leader with the means to work with all of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from moe_ray.config.model import ModelConfig
from moe_ray.models.expert_copies import experts_are_copies
from moe_ray.models.joint_passes import Leader, follow
from moe_ray.orchestration.cluster.model_process import ModelHolder, process_device
from moe_ray.storage.folder import Folder

_OVERLAY, _PUT_BACK, _COMPARE = "overlay", "put back", "compare"

_STORE: Any = vars(dist)["TCPStore"]  # torch's types do not tell of it

_NEVER = timedelta(days=14)
"""A process waits for the leader as long as no stage needs the model; that one died is heard from Ray, not by waiting."""


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """Where the processes of a group meet.

    Attributes:
        host: address of the leader's node.
        port: of its store.
        size: how many processes meet.
        rank: of the process that is told; 0 = the leader.
    """

    host: str
    port: int
    size: int
    rank: int = 0


def open_meeting(host: str, size: int) -> tuple[Any, Meeting]:
    """A store in this process, which leads, on a port that is free.

    Args:
        host: address of this node that the others know.
        size: how many processes meet.
    """
    store = _STORE(host, 0, size, is_master=True, wait_for_workers=False, timeout=_NEVER)
    return store, Meeting(host=host, port=store.port, size=size)


def join(meeting: Meeting, store: Any = None) -> None:
    """Waits for the others, and forms `torch.distributed`'s default group with them.

    Args:
        meeting: where.
        store: the leader's own.
    """
    if store is None:
        store = _STORE(meeting.host, meeting.port, meeting.size, is_master=False, timeout=_NEVER)
    # Ray shows a process its own GPU only, as the first.
    names = {"RANK": meeting.rank, "WORLD_SIZE": meeting.size, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    os.environ.update({name: str(value) for name, value in names.items()})
    backend = "cpu:gloo,cuda:nccl" if process_device().type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=meeting.rank, world_size=meeting.size, timeout=_NEVER)


class LeadingHolder(ModelHolder):
    """The leader's model, whose passes and overlays the other processes take part in.

    Args:
        model: which one.
        num_processes: how many groups share this node's cores.
    """

    def __init__(self, model: ModelConfig, num_processes: int) -> None:
        super().__init__(model, num_processes, num_shards=model.num_shards)
        self._leader = Leader(self.model)

    @contextmanager
    def with_adapter(self, adapter: Folder | None) -> Iterator[None]:
        """As of one process: every process puts in what it holds of the learned experts."""
        if adapter is None:
            yield
            return
        self._leader.tell(_OVERLAY, adapter.url)
        with super().with_adapter(adapter):
            yield
        # Not after an error, which ends the group.
        self._leader.tell(_PUT_BACK)

    def experts_are_copies(self) -> bool:
        """As of one process: every process shows what it holds."""
        self._leader.tell(_COMPARE)
        return super().experts_are_copies()


def serve(model: ModelConfig, meeting: Meeting) -> None:
    """Meets the leader, and holds a part of the model for it; never returns by itself."""
    join(meeting)
    hold_part(model, meeting.size)


def hold_part(model: ModelConfig, size: int) -> None:
    """Loads this process's part of the model and takes part in what the leader does; never returns by itself.

    Args:
        model: which one.
        size: how many processes hold it.
    """
    holder = ModelHolder(model, 1, num_shards=size)
    torch.set_num_threads(1)  # it computes next to nothing
    overlay = ExitStack()

    def put_in(url: str) -> None:
        overlay.enter_context(holder.with_adapter(Folder.open(url)))

    calls: dict[str, Callable[..., object]] = {
        _OVERLAY: put_in,
        _PUT_BACK: overlay.close,
        _COMPARE: lambda: experts_are_copies(holder.model),
    }
    follow(holder.model, calls)

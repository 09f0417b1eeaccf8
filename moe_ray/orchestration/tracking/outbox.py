"""What is meant for a tracking server, kept until the server has it.

Items are delivered in order, at once while the server answers. When it does not, they wait in a file of the run
directory; the next item, the end of the run, or the next run there tries again, ever less often while nothing answers, so
that a lost server costs a training run seconds and no data.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from moe_ray.storage.damage import reading
from moe_ray.storage.folder import Folder

logger = logging.getLogger(__name__)

SPOOL = "mlflow_unsent.jsonl"
_FIRST_PAUSE, _LONGEST_PAUSE = 5.0, 300.0
"""Seconds without an attempt after one that failed; doubled each time."""

Item = dict[str, Any]


class Unreachable(Exception):
    """The server did not answer; the item may be sent later."""


class Refused(Exception):
    """The server answered that it will never take this item."""


class Outbox:
    """A queue of plain items in front of a server.

    Args:
        folder: holds the spool file.
        destination: the server's address; items for another one stay in the spool.
        deliver: sends one item, or raises `Unreachable` or `Refused`.
    """

    def __init__(self, folder: Folder, destination: str, deliver: Callable[[Item], None]) -> None:
        self.folder, self.destination, self._deliver = folder, destination, deliver
        self.refused: list[str] = []
        self._foreign: list[Item] = []
        self._waiting: deque[Item] = deque()
        self._lock = threading.RLock()
        self._pause, self._next_attempt = _FIRST_PAUSE, 0.0
        self._is_spooled = folder.exists(SPOOL)
        if self._is_spooled:
            items = _read_items(folder)
            self._waiting.extend(item for item in items if item["destination"] == destination)
            self._foreign = [item for item in items if item["destination"] != destination]

    def __len__(self) -> int:
        """Items that wait for this server."""
        return len(self._waiting)

    @property
    def num_foreign(self) -> int:
        """Items that wait for another server."""
        return len(self._foreign)

    def send(self, item: Item) -> None:
        """Delivers the item after those that wait, now or later."""
        with self._lock:
            self._waiting.append({"destination": self.destination, **item})
            if time.monotonic() < self._next_attempt:
                self._save()
            else:
                self.flush()

    def flush(self) -> bool:
        """Delivers what waits, as far as the server takes it; whether nothing is left."""
        with self._lock:
            while self._waiting:
                item = self._waiting[0]
                try:
                    self._deliver(item)
                except Unreachable as error:
                    self._put_off(error)
                    return False
                except Refused as error:
                    self.refused.append(f"{item['kind']}: {error}")
                    logger.warning("MLflow refused %s: %s", item["kind"], error)
                self._waiting.popleft()
            if self._next_attempt:
                logger.info("MLflow answers again; everything that waited is sent")
            self._pause, self._next_attempt = _FIRST_PAUSE, 0.0
            if self._is_spooled:
                self._save()
            return True

    def rename(self, old: str, new: str) -> None:
        """Gives the items that wait for run `old` its name on the server, `new`."""
        for item in self._waiting:
            for key in ("run", "parent"):
                if item.get(key) == old:
                    item[key] = new

    def _put_off(self, error: Exception) -> None:
        if not self._next_attempt:
            logger.warning("MLflow does not answer (%s); what it should get waits in %s", error, self._spool_path())
        self._next_attempt = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        self._save()

    def _spool_path(self) -> str:
        return self.folder.file(SPOOL)

    def _save(self) -> None:
        items = [*self._foreign, *self._waiting]
        self._is_spooled = bool(items)
        if items:
            self.folder.write_bytes(SPOOL, "".join(json.dumps(item) + "\n" for item in items).encode())
        elif self.folder.exists(SPOOL):
            self.folder.fs.rm(self._spool_path())


def _read_items(folder: Folder) -> list[Item]:
    """What waits in a run directory.

    Raises:
        InputError: the file is damaged.
    """
    data = folder.read_bytes(SPOOL)
    cure = "remove it; what it holds is lacking in MLflow then, and still in the run directory"
    with reading(folder.file(SPOOL), expected="a line of JSON for every item that waits", cure=cure):
        items: list[Item] = [json.loads(line) for line in data.decode().splitlines()]
        if not all(isinstance(item[name], str) for item in items for name in ("destination", "kind", "run")):
            raise TypeError("an item has no destination, kind or run")
    return items

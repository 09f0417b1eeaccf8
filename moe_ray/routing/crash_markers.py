"""Which example a process was working on when it died, so that one that kills processes is found and left out.

A dead process leaves nothing behind but what it wrote before, so each attempt at a window of examples writes a marker:

1. The first attempt marks the window as begun, and nothing more: noting examples takes time.
2. An attempt that finds the window marked as begun notes before each forward pass which examples are in it.
3. An attempt that finds such a note tries those examples one by one; one that kills its process alone is given up.

Markers of another run of the program are ignored, since that run may have been stopped on purpose at any moment.
"""

from __future__ import annotations

from collections.abc import Sequence

from moe_ray.storage.folder import Folder

MAX_UNEXPLAINED_DEATHS = 5
"""Deaths in one window, none of them while an example was being tried, after which the window is given up as a whole."""


class Attempt:
    """One process's attempt at a window.

    Args:
        folder: holds the markers.
        window: the window's name.
        session: the program run's name.

    Attributes:
        is_repeated: a process of this run died in this window before.
        alone: examples to try one by one, by position.
        guilty: examples that killed a process alone.

    Raises:
        RuntimeError: processes die in this window without any example being tried.
    """

    def __init__(self, folder: Folder, window: str, session: str) -> None:
        self._folder, self._name, self._session = folder, f"{window}.json", session
        before = folder.read_json(self._name) if folder.exists(self._name) else {}
        self.is_repeated = before.get("session") == session
        self.alone: list[int] = []
        self.guilty: list[int] = []
        self._unexplained = 0
        if self.is_repeated:
            self._learn(before["trying"], before["alone"], before["guilty"], before["unexplained"])
        if self._unexplained > MAX_UNEXPLAINED_DEATHS:
            raise RuntimeError(
                f"{self._unexplained} processes died while they prepared or wrote examples {window}; look for the reason "
                "in the logs of Ray's workers (often: the machine runs out of memory)"
            )
        self._write([])

    def _learn(self, trying: list[int], alone: list[int], guilty: list[int], unexplained: int) -> None:
        self.guilty = guilty + (trying if len(trying) == 1 else [])
        more = trying if len(trying) > 1 else []
        self.alone = [row for row in dict.fromkeys([*alone, *more]) if row not in self.guilty]
        self._unexplained = unexplained + (not trying)

    def trying(self, rows: Sequence[int]) -> None:
        """Notes that these examples, by position, are worked on now; only a repeated attempt takes the time."""
        if self.is_repeated:
            self._write([int(row) for row in rows])

    def finished(self) -> None:
        """The window is done."""
        self._folder.remove(self._name)

    def _write(self, trying: list[int]) -> None:
        state = {"session": self._session, "trying": trying, "alone": self.alone, "guilty": self.guilty}
        self._folder.write_json(self._name, {**state, "unexplained": self._unexplained})

"""Which examples a process counts next: windows of some seconds of work, from what the windows before them took.

A driver spends some time on each window whatever its size, so windows of a fixed number of examples would keep it busy for
a few fast GPUs. Windows begin small, since nothing is measured yet, and grow until one takes `seconds`. Towards the end
they shrink, so that all processes end together. What is lost with a process does not depend on them: parts are written
within a window.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

MIN_WINDOW = 64
"""Examples of a window that takes hardly longer than handing it out; also of the first ones."""

MAX_WINDOW = 1 << 16
"""Examples of the largest window: half a megabyte of positions."""

SECONDS_PER_WINDOW = 10.0
"""Work of one process: many times what the driver spends on a window, few enough to balance and to see progress."""

_GROWTH = 4
"""A window is at most so many times the largest that was measured: a short one says little about a long one."""

_WINDOWS_PER_PROCESS = 3
"""Windows that are still to be handed out to each process, at least, while there are examples for it."""

_MEMORY = 0.9
"""Weight of what was measured before, against the next window: prompts change along a set."""


class WindowPlan:
    """Hands out every example once, in windows that are cut between batches; a larger batch is a window of its own.

    Args:
        batch_idx: of each example, in the order in which they are stored.
        num_processes: how many work at the same time.
        seconds: of work of a window.
        min_rows: examples of a window, at least, while there are so many.
        max_rows: examples of a window, at most.

    Attributes:
        remaining: examples that are in no window yet.
    """

    def __init__(
        self,
        batch_idx: npt.NDArray[np.int64],
        *,
        num_processes: int,
        seconds: float = SECONDS_PER_WINDOW,
        min_rows: int = MIN_WINDOW,
        max_rows: int = MAX_WINDOW,
    ) -> None:
        self._num_processes, self._seconds, self._min_rows, self._max_rows = num_processes, seconds, min_rows, max_rows
        # Where a window may end: after the last example of a batch.
        self._ends = np.append(np.flatnonzero(np.diff(batch_idx)), len(batch_idx) - 1) + 1
        self._next, self.remaining = 0, len(batch_idx)
        self._examples = self._spent = 0.0
        self._largest = 0

    @property
    def rate(self) -> float:
        """Examples a second of one process; 0 = not measured yet."""
        return self._examples / self._spent if self._spent else 0.0

    def measured(self, examples: int, seconds: float) -> None:
        """A window of so many examples took a process so long, without waiting."""
        self._examples = _MEMORY * self._examples + examples
        self._spent = _MEMORY * self._spent + max(seconds, 1e-6)
        self._largest = max(self._largest, examples)

    def next(self) -> range | None:
        """Positions of the next window; None = there are no examples left."""
        if not self.remaining:
            return None
        start, wanted = self._next, self._next + self._size()
        # The last end that is not beyond what is wanted, else the end of the first batch.
        fitting = int(np.searchsorted(self._ends, wanted, side="right")) - 1
        first = int(np.searchsorted(self._ends, start, side="right"))
        self._next = int(self._ends[max(fitting, first)])
        self.remaining -= self._next - start
        return range(start, self._next)

    def _size(self) -> int:
        fair = -(-self.remaining // (_WINDOWS_PER_PROCESS * self._num_processes))
        in_time = min(int(self.rate * self._seconds), _GROWTH * self._largest)
        return min(max(min(in_time, fair), self._min_rows), self._max_rows)

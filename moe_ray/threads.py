"""How many threads compute in a process, and how they wait for one another.

A parallel region of OpenMP ends when its slowest thread does. By default the others wait in a loop that keeps their cores
busy; where a core is shared with another process, that takes from the very thread they wait for, and a training step of a
small model takes up to a hundred times as long. Threads that sleep while they wait lose little on a machine of their own.
"""

from __future__ import annotations

import os

WAIT_POLICY = "OMP_WAIT_POLICY"
PASSIVE = "PASSIVE"

_PARAMETERS_WORTH_SHARING = 20_000_000
"""Below this, a matrix product is done before a second thread has woken up: the demo's model has 1 million."""

_set_here = False


def wait_passively() -> None:
    """Lets OpenMP's threads sleep while they wait, unless the environment says how they shall wait.

    OpenMP reads the environment when torch is imported, so this comes before; processes started later inherit it.
    """
    global _set_here
    if WAIT_POLICY not in os.environ:
        os.environ[WAIT_POLICY] = PASSIVE
        _set_here = True


def variables_for_workers() -> dict[str, str]:
    """The environment of processes that do not inherit this one's: empty where the user has said how threads wait."""
    return {WAIT_POLICY: PASSIVE} if _set_here else {}


def usable_cores() -> int:
    """Cores that this process may use, by its affinity and its container's quota; at least 1."""
    from joblib import cpu_count

    cores: int = cpu_count()
    return cores


def threads_of_process(num_processes: int, num_parameters: int | None = None) -> int:
    """How many threads should compute in this process; at least 1.

    Args:
        num_processes: how many processes share the cores.
        num_parameters: of the model; None = not known.
    """
    if num_parameters is not None and num_parameters < _PARAMETERS_WORTH_SHARING:
        return 1
    return max(1, usable_cores() // num_processes)

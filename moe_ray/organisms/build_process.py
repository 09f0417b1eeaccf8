"""The embedded model built in a process of its own, while the caller does something else."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from moe_ray.organisms.recipe import OrganismRecipe, embedded_folder

logger = logging.getLogger(__name__)

_SECONDS_TO_CLEAN_UP = 10.0


class EmbeddedBuild:
    """A build of the embedded model, if it is not there yet; as a context it leaves no process behind.

    Args:
        cache_dir: As `build_embedded`'s.
        seed: As `build_embedded`'s.
        recipe: What is built; None = the recipe of the demo.

    Attributes:
        folder: Of the checkpoint, which is there after `wait`.
    """

    def __init__(self, cache_dir: str | Path, *, seed: int = 0, recipe: OrganismRecipe | None = None) -> None:
        self.folder = embedded_folder(cache_dir, seed=seed, recipe=recipe)
        # A fork would inherit the locks of whatever threads there are.
        self._process = multiprocessing.get_context("spawn").Process(
            target=_build, args=(str(cache_dir), seed, recipe), name="embedded model", daemon=True
        )

    def __enter__(self) -> Self:
        if not self.folder.is_dir():
            self._process.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(_SECONDS_TO_CLEAN_UP)
            self._process.kill()

    def wait(self) -> None:
        """Returns when the checkpoint is there.

        Raises:
            RuntimeError: The build failed; what went wrong is on standard error.
        """
        if self._process.pid is not None:
            self._process.join()
        if not self.folder.is_dir():
            raise RuntimeError(
                f"the embedded model could not be built (exit status {self._process.exitcode}); see above"
            )


def _build(cache_dir: str, seed: int, recipe: OrganismRecipe | None) -> None:
    # Ctrl-C reaches every process of a terminal; the one that waits says what becomes of this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    from moe_ray.organisms.build import build_embedded

    build_embedded(cache_dir, seed=seed, recipe=recipe, progress=_log)


def _log(done: int, total: int, loss: float) -> None:
    if done in (1, total) or done % max(1, total // 10) == 0:
        logger.info("building the embedded model (once): step %d of %d, loss %.3f", done, total, loss)

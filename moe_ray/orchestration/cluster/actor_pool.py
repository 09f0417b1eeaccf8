"""A pool of Ray Data actors that each hold a judge and work on blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data

from moe_ray.orchestration.cluster.ray_session import require_cpus, resources_released

Columns = dict[str, np.ndarray[Any, Any]]


@contextmanager
def in_actors(
    blocks: Sequence[pa.Table],
    actor: type,
    arguments: tuple[Any, ...],
    *,
    what: str,
    num_actors: int,
    gpus_per_actor: float = 0.0,
) -> Iterator[Iterator[Columns]]:
    """Has actors work on the blocks; at the end of the context their GPUs and CPUs are free again.

    Args:
        blocks: one call's rows each.
        actor: called with the columns of a block.
        arguments: of its constructor; small, since Ray keeps them to start an actor again.
        what: the work, for errors and warnings.
        num_actors: how many actors.
        gpus_per_actor: a fraction of a GPU, one, or several.

    Yields:
        what an actor returned for a block, one after another, in any order of blocks.

    Raises:
        InputError: a local Ray has too few CPUs, and the actors would wait for ever.
    """
    require_cpus(num_actors + 1, what)
    pool = ray.data.ActorPoolStrategy(size=num_actors)
    with resources_released(what):
        results = mapped(blocks, actor, arguments, pool, gpus_per_actor=gpus_per_actor)
        yield iter(results.iter_batches(batch_size=None, batch_format="numpy"))


def mapped(
    blocks: Sequence[pa.Table], actor: type, arguments: tuple[Any, ...], pool: Any, *, gpus_per_actor: float
) -> Any:
    """The data set of what the actors return; the work starts when it is read."""
    return ray.data.from_arrow(list(blocks)).map_batches(
        actor,
        fn_constructor_args=arguments,
        compute=pool,
        # Whole blocks; `None` would say that too, but not where GPUs are asked for: Ray Data wants a number there.
        batch_size=max(map(len, blocks)),
        batch_format="numpy",
        num_gpus=gpus_per_actor or None,
    )


def blocks_of(table: pa.Table, rows: int) -> list[pa.Table]:
    """The table in blocks of at most `rows` rows."""
    return [table.slice(start, rows) for start in range(0, len(table), rows)]

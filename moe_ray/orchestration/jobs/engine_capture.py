"""Routing capture by an engine: the same windows, parts and quarantine, with counts from the routes that it records.

An engine that records wrongly is seen in two ways: every array must be of the known form, and the first window's examples
are run by transformers too, token for token. Only what agrees is counted on.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_ray.config.auto import gpus_of
from moe_ray.errors import InputError
from moe_ray.models.generation import Response
from moe_ray.models.loading import context_length
from moe_ray.models.token_budget import TokenBudget
from moe_ray.models.tokenization import TokenizedRow, pad_token_id
from moe_ray.orchestration.cluster.engine_process import EngineHolder, engine_pool
from moe_ray.orchestration.cluster.model_actor import ModelWork
from moe_ray.orchestration.cluster.model_pool import ModelPool, pool_for
from moe_ray.orchestration.cluster.model_process import ModelHolder
from moe_ray.orchestration.jobs.capture_actor import CaptureActor, CaptureJob
from moe_ray.orchestration.jobs.capture_window import label_columns
from moe_ray.prompts.stored_examples import StoredExample, StoredExamples
from moe_ray.routing.capture import count_rows, counts_from_forward
from moe_ray.routing.counter import counting
from moe_ray.routing.counts import ROLES, RoutingCounts
from moe_ray.routing.encode_example import Encoded, encode_example
from moe_ray.routing.engine_routes import Routes, compare_routes, count_row_routes
from moe_ray.routing.window_plan import MIN_WINDOW
from moe_ray.run_directory import CAPTURE, PARITY, PROMPTS, RunDirectory
from moe_ray.storage.folder import Folder

logger = logging.getLogger(__name__)


class EngineCaptureActor(CaptureActor):
    """Counts windows by an engine's routes. It gets a chunk of examples at once: it batches them itself, unpadded."""

    holder: EngineHolder

    def __init__(self, holder: EngineHolder, job: CaptureJob) -> None:
        super().__init__(holder, job)
        self.budget = TokenBudget(sys.maxsize, max_padding=1.0)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Nothing is attached to an engine; whether experts are copies would be told by weights, which it keeps."""
        yield

    def longest(self) -> int | None:
        """The most tokens of an example, with room for the one that the engine generates behind it."""
        limits = [self.job.config.max_tokens or None, _longest_for_engine(self.holder)]
        return min((limit for limit in limits if limit is not None), default=None)

    def respond(self, prompts: list[list[int]], seeds: list[int]) -> list[Response]:
        """Responses to these token ids, each with random numbers of its seed."""
        config = self.job.config
        return self.holder.respond(
            prompts, max_new_tokens=config.max_new_tokens, temperature=config.temperature, seeds=seeds
        )

    def run_tokens(self, lengths: Mapping[int, int], group: list[int]) -> int:
        """How many tokens a pass over these rows runs."""
        return sum(lengths[index] for index in group)

    def forward(self, examples: list[StoredExample], rows: list[TokenizedRow]) -> RoutingCounts:
        """The counts of these rows."""
        moe_layers = self.holder.moe_layers
        routes = self.holder.routes([row.prompt_ids + row.answer_ids for row in rows])
        counted = count_row_routes(rows, routes, moe_layers.num_experts)
        part = counts_from_forward(
            counted.counts,
            counted.num_tokens,
            **label_columns(examples),
            ids=counted.ids if self.job.config.ids else None,
            moe_layers=moe_layers,
        )
        part.check()
        return part


class OwnRoutes(ModelWork):
    """Which experts transformers routes stored examples to."""

    job: CaptureJob

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """The counter is attached to the model."""
        with counting(self.holder.model, ids=True) as self.counter:
            yield

    def __call__(self, positions: npt.NDArray[np.int64]) -> list[tuple[list[int], Routes]]:
        """The token ids of the examples that can be run, and the (S, L, K) experts of each."""
        stored = StoredExamples(Folder.open(self.job.run_url).sub(PROMPTS))
        limit, tokenizer = _longest_for_engine(self.holder), self.holder.tokenizer
        encoded = [
            encode_example(tokenizer, example["messages"], example["response"], limit=limit)
            for example in stored.read(positions)
        ]
        # One role, so that the routes come in the order of the tokens.
        rows = [
            TokenizedRow(one.row.prompt_ids + one.row.answer_ids, []) for one in encoded if isinstance(one, Encoded)
        ]
        found: list[tuple[list[int], Routes]] = []
        budget = TokenBudget(self.job.config.tokens_per_forward)

        def work(group: list[int]) -> list[npt.NDArray[Any]]:
            chosen = [rows[index] for index in group]
            count_rows(self.holder.model, self.counter, chosen, pad_id=pad_token_id(tokenizer))
            assert self.counter.last_ids is not None
            return self.counter.last_ids[:: len(ROLES)]

        for group, ids in budget.run_all([row.num_tokens for row in rows], work):
            found += [
                (rows[index].prompt_ids, of_row.astype(np.int64)) for index, of_row in zip(group, ids, strict=True)
            ]
        return found


class EngineRoutes(ModelWork):
    """Which experts an engine says that it routed token ids to."""

    holder: EngineHolder

    def __call__(self, texts: list[list[int]]) -> tuple[str, list[Routes]]:
        """The engine's version, and the (S, L, K) experts of each text."""
        return self.holder.engine.version, self.holder.routes(texts)


def _longest_for_engine(holder: ModelHolder) -> int | None:
    longest = context_length(holder.model)
    return None if longest is None else longest - 1


@contextmanager
def checked_engines(
    run: RunDirectory, job: CaptureJob, todo: npt.NDArray[np.int64], models: ModelPool | None
) -> Iterator[ModelPool]:
    """Engines whose routes of the first window are those of transformers; what was found is written to the capture folder.

    Args:
        run: of the capture.
        job: of the capture.
        todo: positions of the stored examples that are to be counted.
        models: the run's processes; None = some for this alone.

    Raises:
        InputError: the routes are not of the form that is known, or too few are transformers'.
    """
    out, config = run.sub(CAPTURE), job.config
    gpus, own = gpus_of(config.gpus_per_actor), None
    if not out.exists(PARITY):
        with (
            pool_for(job.model, models) as pool,
            pool.working([todo[:MIN_WINDOW]], OwnRoutes, job, what="routes to compare", gpus=gpus) as results,
        ):
            (own,) = results
        if not own:
            raise InputError(
                f"capture.engine=vllm: none of the first {MIN_WINDOW} examples can be run, so there is nothing to "
                "hold its routes against; see the prompts, or set capture.engine=transformers"
            )
    with engine_pool(job.model, models, gpus=gpus, returns_routes=True) as engines:
        if own is not None:
            texts = [tokens for tokens, _ in own]
            with engines.working([texts], EngineRoutes, job, what="routes to compare", gpus=gpus) as results:
                ((version, theirs),) = results
            out.write_json(PARITY, {"version": version, **_agreement(theirs, own, least=config.min_parity)})
        yield engines


def _agreement(theirs: list[Routes], own: list[tuple[list[int], Routes]], *, least: float) -> dict[str, Any]:
    try:
        parity = compare_routes(np.concatenate(theirs), np.concatenate([routes for _, routes in own]), least=least)
    except InputError as error:
        raise InputError(f"capture.engine=vllm, capture.min_parity={least:g}: {error}") from error
    logger.info(
        "routing capture: %.2f%% of %d choices by vLLM are those of transformers",
        *(100 * parity.share_equal, parity.num_choices),
    )
    return {"examples": len(own), **asdict(parity)}

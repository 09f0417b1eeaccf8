"""The process that counts: it takes a window of the stored examples, counts them, and writes what it counted.

Nothing but positions goes to an actor and nothing but a few numbers comes back: it reads the examples from the stored
batches and writes counts, responses and quarantined examples as Parquet parts, each whole or not at all. A window may be
of any size: an actor holds some examples of the one it counts, some of another that it prepares meanwhile, and of both the
counts that are not written yet.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from moe_ray.config.capture import CaptureConfig
from moe_ray.config.model import ModelConfig
from moe_ray.errors import InputError
from moe_ray.models.generation import Response, example_seed, generate_responses
from moe_ray.models.loading import context_length
from moe_ray.models.token_budget import TokenBudget, padded_tokens
from moe_ray.models.tokenization import TokenizedRow, pad_token_id
from moe_ray.orchestration.cluster.model_actor import ModelWork
from moe_ray.orchestration.cluster.model_process import ModelHolder
from moe_ray.orchestration.jobs.capture_window import Noted, Window, WindowReport, label_columns
from moe_ray.prompts.quarantine import PROCESS_DIED, Rejected, quarantine_frame, rejected_row
from moe_ray.prompts.stored_examples import StoredExample, StoredExamples
from moe_ray.routing.capture import count_rows, counts_from_forward
from moe_ray.routing.capture_batches import longest_prompt, with_response
from moe_ray.routing.count_keys import all_keys, keys_of
from moe_ray.routing.count_store import MAX_ROWS_PER_GROUP
from moe_ray.routing.count_tables import counts_to_table
from moe_ray.routing.counter import counting
from moe_ray.routing.counts import RoutingCounts, concat_counts
from moe_ray.routing.crash_markers import Attempt
from moe_ray.routing.encode_example import Encoded, encode_example
from moe_ray.routing.row_scores import RowScorer
from moe_ray.run_directory import ABOUT_MODEL, ATTEMPTS, CAPTURE, COUNTS, PROMPTS, REJECTED, RESPONSES, SHORTENED
from moe_ray.storage.fingerprint import content_hash
from moe_ray.storage.folder import Folder

_KEYS = ["batch_idx", "in_batch_idx"]

MAX_CHUNK, MAX_GENERATED_CHUNK = 1024, 256
"""Examples that are prepared and counted at a time: enough of them to find rows of like length, few enough to hold; fewer
where responses are generated, which takes longer, since none is written before it is counted."""

MAX_PART_BYTES = 64 << 20
"""Of counts that are held, after which a part is written."""


@dataclass(frozen=True, kw_only=True)
class CaptureJob:
    """What every actor needs to know; plain values.

    Attributes:
        run_url: the run directory.
        session: names this run of the program.
        seed: of sampled responses.
        seconds_per_part: a window that takes longer is written in several parts, so that less is lost with a process.
    """

    model: ModelConfig
    config: CaptureConfig
    run_url: str
    session: str
    seed: int = 0
    seconds_per_part: float = 20.0


class CaptureActor(ModelWork):
    """Counts the routing of the windows that its process is given.

    Two threads call it, each for a window: while one runs the model, the other reads and tokenises its next examples.
    """

    job: CaptureJob

    def __init__(self, holder: ModelHolder, job: CaptureJob) -> None:
        super().__init__(holder, job)
        run = Folder.open(job.run_url)
        self.stored = StoredExamples(run.sub(PROMPTS))
        self.parts, self.texts = run.sub(COUNTS), run.sub(RESPONSES)
        self.rejects, self.shortened, self.attempts = run.sub(REJECTED), run.sub(SHORTENED), run.sub(ATTEMPTS)
        self.budget = TokenBudget(job.config.tokens_per_forward)
        self.model_lock = threading.RLock()

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """The counter is attached to the model. What that is like is written first: a kill may follow any count."""
        config, out = self.job.config, Folder.open(self.job.run_url).sub(CAPTURE)
        if not out.exists(ABOUT_MODEL):
            out.write_json(ABOUT_MODEL, {"experts_are_copies": self.holder.experts_are_copies()})
        with counting(self.holder.model, weights=config.weights, ids=config.ids) as self.counter:
            yield

    def __call__(self, positions: npt.NDArray[np.int64]) -> WindowReport:
        """Counts the examples at these positions of the stored batches, ascending.

        Raises:
            InputError: an example that cannot be counted is to stop the capture.
        """
        name = f"{positions[0]:09d}-{content_hash(positions.tolist())[:8]}"
        attempt = Attempt(self.attempts, name, self.job.session)
        size = MAX_GENERATED_CHUNK if self.job.config.generate else MAX_CHUNK
        # What a repeated attempt notes as being tried must be the only thing that this process works on.
        with self.model_lock if attempt.is_repeated else nullcontext():
            window = Window(name=name, attempt=attempt)
            window.report.examples = len(positions)
            done = self._done_before(window)
            for start in range(0, len(positions), size):
                self._count_chunk(window, start, positions[start : start + size], done)
            self._write(window)
        attempt.finished()
        return window.report

    def _count_chunk(
        self, window: Window, start: int, positions: npt.NDArray[np.int64], done: npt.NDArray[np.int64]
    ) -> None:
        """Counts the examples of a window from index `start` on; writes them if enough are held."""
        began = time.monotonic()
        window.examples = dict(enumerate(self.stored.read(positions), start))
        window.rows.clear()
        self._encode(window, done)
        prepared = time.monotonic()
        with self.model_lock:
            has_model = time.monotonic()
            self._generate(window)
            self._count(window)
        window.report.seconds += max(prepared - began, time.monotonic() - has_model)
        if window.held_bytes > MAX_PART_BYTES:
            self._write(window)

    def _done_before(self, window: Window) -> npt.NDArray[np.int64]:
        """Keys of the examples that a process had written before it died."""
        if not window.attempt.is_repeated:
            return np.empty(0, dtype=np.int64)
        return np.concatenate(
            [
                all_keys(folder, [part for part in folder.parquet_names() if part.startswith(window.part_prefix)])
                for folder in (self.parts, self.rejects)
            ]
        )

    def _encode(self, window: Window, done: npt.NDArray[np.int64]) -> None:
        config, tokenizer = self.job.config, self.holder.tokenizer
        limit = self.longest()
        keys = keys_of(*([example[name] for example in window.examples.values()] for name in _KEYS))
        for (index, example), is_done in zip(window.examples.items(), np.isin(keys, done).tolist(), strict=True):
            if is_done:
                continue
            if index in window.attempt.guilty:
                window.reject(index, Rejected(PROCESS_DIED, "processes that worked on it alone died"))
                continue
            window.attempt.trying([index])
            own_limit = longest_prompt(limit, example["response"], config)
            try:
                encoded = encode_example(
                    tokenizer,
                    example["messages"],
                    example["response"],
                    limit=own_limit,
                    too_long=config.too_long,
                    template_tokens=config.template_tokens,
                )
            except InputError as error:
                raise InputError(f"{example['id']}: {error}") from error
            if isinstance(encoded, Encoded):
                window.rows[index] = encoded.row
                if encoded.full_length:
                    why = Rejected("truncated", f"{encoded.full_length} tokens, cut to {own_limit}")
                    window.shortened.append(rejected_row(example, why))
            else:
                window.reject(index, encoded)
        window.attempt.trying([])

    def _generate(self, window: Window) -> None:
        """Gives a response to rows that have none, where that is asked for."""
        config = self.job.config
        without = [index for index in window.rows if config.generate and not window.examples[index]["response"]]
        missing = {index: window.rows[index] for index in without}
        lengths = {index: len(row.prompt_ids) + config.max_new_tokens for index, row in missing.items()}

        def work(group: list[int]) -> list[Response]:
            seeds = [
                example_seed(self.job.seed, window.examples[i]["batch_idx"], window.examples[i]["in_batch_idx"])
                for i in group
            ]
            return self.respond([missing[index].prompt_ids for index in group], seeds)

        for group, responses in self._in_budget(window, lengths, work):
            for index, response in zip(group, responses, strict=True):
                window.rows[index] = with_response(missing[index], response)
                names = {name: window.examples[index][name] for name in (*_KEYS, "id", "label")}
                answer = {"response": response.text, "ids": response.ids, "ended": response.ended}
                window.responses[index] = {**names, **answer}

    def _count(self, window: Window) -> None:
        lengths = {index: len(row.prompt_ids) + len(row.answer_ids) for index, row in window.rows.items()}

        def work(group: list[int]) -> RoutingCounts:
            return self.forward([window.examples[index] for index in group], [window.rows[index] for index in group])

        for group, counts in self._in_budget(window, lengths, work):
            window.counted.append(counts)
            window.counted_rows += group
            window.report.forwards += 1
            window.report.tokens += sum(lengths[index] for index in group)
            window.report.padded += self.run_tokens(lengths, group)
            if time.monotonic() - window.written > self.job.seconds_per_part:
                self._write(window)

    def _in_budget(self, window: Window, lengths: Mapping[int, int], work: Callable[[list[int]], Any]) -> Iterator[Any]:
        """Yields groups of examples with what `work` gave for them; the others are rejected."""
        halvings = self.budget.halvings
        alone = [index for index in window.attempt.alone if index in lengths]
        for indices in [*([index] for index in alone), sorted(lengths.keys() - set(alone))]:
            noted = Noted(window.attempt, indices, work)
            for positions, outcome in self.budget.run([lengths[index] for index in indices], noted):
                group = noted.indices_of(positions)
                if isinstance(outcome, Rejected):
                    window.reject(group[0], outcome)
                else:
                    yield group, outcome
        window.attempt.trying([])
        window.report.halvings += self.budget.halvings - halvings

    def longest(self) -> int | None:
        """The most tokens of an example; None = any."""
        return self.job.config.max_tokens or context_length(self.holder.model)

    def respond(self, prompts: list[list[int]], seeds: list[int]) -> list[Response]:
        """Responses to these token ids, each with random numbers of its seed."""
        return generate_responses(
            *(self.holder.model, self.holder.tokenizer, prompts),
            max_new_tokens=self.job.config.max_new_tokens,
            temperature=self.job.config.temperature,
            seeds=seeds,
        )

    def run_tokens(self, lengths: Mapping[int, int], group: list[int]) -> int:
        """How many tokens a pass over these rows runs."""
        return padded_tokens(lengths, group)

    def forward(self, examples: list[StoredExample], rows: list[TokenizedRow]) -> RoutingCounts:
        """The counts of one forward pass."""
        model, tokenizer, counter = self.holder.model, self.holder.tokenizer, self.counter
        counts, num_tokens = count_rows(model, counter, rows, pad_id=pad_token_id(tokenizer))
        weights, ids = counter.last_weights, counter.last_ids
        score = RowScorer(model=model, tokenizer=tokenizer, counter=counter, scores=self.job.config.scores)
        labels, targets = ([example[name] for example in examples] for name in ("label", "target"))
        part = counts_from_forward(
            counts,
            num_tokens,
            **label_columns(examples),
            weights=weights,
            ids=ids,
            scores=score(rows, labels=labels, targets=targets),
            moe_layers=counter.moe_layers,
        )
        part.check()
        return part

    def _write(self, window: Window) -> None:
        """Writes what is not written yet; the counts last, since an example that has counts is done."""
        window.attempt.trying([])
        texts = [window.responses.pop(index) for index in window.counted_rows if index in window.responses]
        for folder, rows in ((self.shortened, window.shortened), (self.rejects, window.rejected)):
            if rows:
                folder.write_table(window.part_name(quarantine_frame(rows)), quarantine_frame(rows))
        if texts:
            self.texts.write_table(window.part_name(pd.DataFrame(texts)), pd.DataFrame(texts))
        if window.counted:
            table = counts_to_table(concat_counts(window.counted))
            self.parts.write_table(
                window.part_name(table.select(_KEYS).to_pandas()), table, row_group_size=MAX_ROWS_PER_GROUP
            )
        window.counted, window.counted_rows, window.rejected, window.shortened = [], [], [], []
        window.written = time.monotonic()

"""An actor works through a window of any size some examples at a time, and loses no more than was not written."""

from types import SimpleNamespace

import numpy as np
import pytest
from capture_helpers import write_batches

from moe_ray.config.capture import CaptureConfig
from moe_ray.config.model import ModelConfig
from moe_ray.models.loading import load_model, load_tokenizer
from moe_ray.orchestration.jobs import capture_actor
from moe_ray.orchestration.jobs.capture_actor import CaptureActor, CaptureJob
from moe_ray.orchestration.jobs.capture_window import label_columns
from moe_ray.prompts.example_tables import frame_to_batches
from moe_ray.prompts.stored_examples import StoredExamples
from moe_ray.routing.capture_batches import capture_batches
from moe_ray.routing.count_keys import all_keys, keys_of
from moe_ray.routing.count_store import read_counts
from moe_ray.routing.counts import SCORE_TENSORS, RoutingCounts
from moe_ray.run_directory import RunDirectory

BATCHES, CHUNK = 40, 16  # of 4 examples


class ActorWithoutModel(CaptureActor):
    """Says how many it prepares at a time, and counts each token for expert 0 of one layer of four."""

    tokenizer = None
    dies_after = 10**9

    def __init__(self, job):
        super().__init__(SimpleNamespace(tokenizer=self.tokenizer), job)
        self.encoded, self.forwards = [], 0

    def _encode(self, window, done):
        super()._encode(window, done)
        self.encoded.append((len(window.examples), len(window.rows)))

    def forward(self, examples, rows):
        self.forwards += 1
        if self.forwards > self.dies_after:
            raise KeyboardInterrupt  # as a process that is ended: nothing of this window is written any more
        num_tokens = np.array([len(row.prompt_ids) + len(row.answer_ids) for row in rows])
        columns = {name: np.asarray(values, dtype=object) for name, values in label_columns(examples).items()}
        columns |= {name: columns[name].astype(np.int64) for name in ("batch_idx", "in_batch_idx")}
        return RoutingCounts(
            **columns,
            role=np.full(len(rows), "prompt", dtype=object),
            num_tokens=num_tokens,
            counts_NLE=np.stack([num_tokens, *[0 * num_tokens] * 3], axis=1).reshape(-1, 1, 4).astype(np.int32),
            layers=(0,),
            num_experts_per_tok=1,
        )


@pytest.fixture
def run(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(ActorWithoutModel, "tokenizer", tiny_tokenizer)
    monkeypatch.setattr(capture_actor, "MAX_CHUNK", CHUNK)
    write_batches(tmp_path / "prompts", BATCHES)
    return RunDirectory.open(str(tmp_path))


def actor_of(run, session="session", **settings):
    config = CaptureConfig(**{"generate": False, "max_tokens": 512, "tokens_per_forward": 128, **settings})
    return ActorWithoutModel(CaptureJob(model=ModelConfig(), config=config, run_url=run.folder.url, session=session))


def everything(run):
    rows = np.arange(4 * BATCHES)
    counts = read_counts(run.counts_folder)
    return np.array_equal(keys_of(counts.batch_idx, counts.in_batch_idx), keys_of(rows // 4, rows % 4))


@pytest.mark.slow
def test_a_large_window_is_read_prepared_and_held_some_examples_at_a_time(run, monkeypatch):
    read, held = [], []
    monkeypatch.setattr(
        StoredExamples,
        "read",
        lambda self, positions, of=StoredExamples.read: read.append(len(positions)) or of(self, positions),
    )
    monkeypatch.setattr(capture_actor, "MAX_PART_BYTES", 16 * 2 * CHUNK)  # 16 bytes an example
    actor = actor_of(run)
    monkeypatch.setattr(
        actor, "_write", lambda window, of=actor._write: held.append(len(window.counted_rows)) or of(window)
    )
    report = actor(np.arange(4 * BATCHES))
    assert read == [CHUNK] * (4 * BATCHES // CHUNK)
    assert actor.encoded == [(CHUNK, CHUNK)] * len(read)
    assert sum(held) == 4 * BATCHES
    assert max(held) == 3 * CHUNK  # the first number of chunks that is above the bound
    assert everything(run)
    assert (report.examples, report.quarantined) == (4 * BATCHES, 0)
    assert report.tokens == read_counts(run.counts_folder).num_tokens.sum()
    assert 0 < report.seconds < 60
    assert run.sub("capture/attempts").names() == []


@pytest.mark.slow
def test_a_window_holds_few_examples_at_a_time_where_responses_are_generated(run, monkeypatch):
    monkeypatch.setattr(capture_actor, "MAX_GENERATED_CHUNK", 4)
    monkeypatch.setattr(ActorWithoutModel, "_generate", lambda self, window: None)
    actor = actor_of(run, generate=True)
    actor(np.arange(24))
    assert [examples for examples, _ in actor.encoded] == [4] * 6


def test_another_attempt_at_a_large_window_counts_only_what_no_part_holds(run, monkeypatch):
    monkeypatch.setattr(capture_actor, "MAX_PART_BYTES", 16 * CHUNK)
    died = actor_of(run)
    died.dies_after = 40
    with pytest.raises(KeyboardInterrupt):
        died(np.arange(4 * BATCHES))
    written = len(all_keys(run.counts_folder, run.counts_folder.parquet_names()))
    assert 0 < written < 4 * BATCHES
    again = actor_of(run)
    report = again(np.arange(4 * BATCHES))
    assert sum(rows for _, rows in again.encoded) == 4 * BATCHES - written
    assert everything(run)
    assert report.quarantined == 0


@pytest.mark.slow
def test_an_example_that_kills_is_found_by_its_place_in_a_large_window(run, monkeypatch):
    """Attempts name examples by their index in the window, not in the few that are held at the time."""
    deadly = 4 * BATCHES - 3

    class Deadly(ActorWithoutModel):
        def forward(self, examples, rows):
            if any((example["batch_idx"], example["in_batch_idx"]) == divmod(deadly, 4) for example in examples):
                raise KeyboardInterrupt
            return super().forward(examples, rows)

    job = actor_of(run).job
    for _ in range(3):  # not noted; noted with others; tried alone
        with pytest.raises(KeyboardInterrupt):
            Deadly(job)(np.arange(4 * BATCHES))
    report = Deadly(job)(np.arange(4 * BATCHES))
    assert report.quarantined == 1
    rejected = run.sub("capture/rejected")
    assert [row for name in rejected.parquet_names() for row in rejected.read_frame(name)["id"]] == [f"row{deadly}"]
    assert len(read_counts(run.counts_folder)) == 4 * BATCHES - 1


@pytest.mark.slow
def test_an_actor_stores_the_scores_that_one_process_captures_and_goes_on_without_losing_any(
    tmp_path, tiny_model_path, monkeypatch
):
    monkeypatch.setattr(capture_actor, "MAX_CHUNK", 8)
    frame, scores = write_batches(tmp_path / "prompts", 4), ("attribution", "gate", "reap", "refusal")
    config = CaptureConfig(generate=False, scores=scores, tokens_per_forward=256)
    model = ModelConfig(path=str(tiny_model_path))
    holder = SimpleNamespace(
        model=load_model(model, device="cpu"), tokenizer=load_tokenizer(model), experts_are_copies=lambda: False
    )
    run = RunDirectory.open(str(tmp_path))
    job = CaptureJob(model=ModelConfig(), config=config, run_url=run.folder.url, session="session")
    for window in (np.arange(5), np.arange(5, 16)):
        actor = CaptureActor(holder, job)
        with actor.in_force():
            actor(window)
    got = read_counts(run.counts_folder)
    expected = capture_batches(holder.model, holder.tokenizer, frame_to_batches(frame), config)
    np.testing.assert_array_equal(got.counts_NLE, expected.counts_NLE)
    np.testing.assert_array_equal(got.refusal_NLE, expected.refusal_NLE)
    np.testing.assert_array_equal(got.refusal_tokens, expected.refusal_tokens)
    assert got.refusal_tokens.any()
    for name in SCORE_TENSORS:
        np.testing.assert_allclose(getattr(got, name), getattr(expected, name), rtol=1e-2, atol=1e-5)

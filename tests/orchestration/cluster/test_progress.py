"""In a log, progress is a line now and then, and none for work that is over."""

import logging
import sys

import pytest

from moe_ray.orchestration.cluster import progress as module
from moe_ray.orchestration.cluster.progress import progress


@pytest.fixture
def clock(monkeypatch, caplog):
    """Seconds that a test moves by hand, in a process without a terminal."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    caplog.set_level(logging.INFO, logger=module.__name__)
    return now


def test_lines_are_seconds_apart_however_fast_work_is_done(clock, caplog):
    with progress("capture", 1000) as meter:
        for _ in range(900):
            clock[0] += 0.1
            meter.advance()
    assert 10 <= len(caplog.messages) <= 90 / 5
    assert meter.done == 900


def test_a_line_says_what_is_done_of_how_much(clock, caplog):
    with progress("capture", 20) as meter:
        clock[0] += 60
        meter.advance(7)
    assert caplog.messages == ["capture: 7 of 20"]


def test_work_that_is_over_is_not_reported_as_going_on(clock, caplog):
    with progress("capture", 3) as meter:
        clock[0] += 60
        meter.advance(3)
    assert caplog.messages == []

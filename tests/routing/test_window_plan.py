"""Windows hold whole batches and every example once, begin small, grow to the seconds they are to take, and end together."""

import heapq

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moe_ray.routing.window_plan import MAX_WINDOW, MIN_WINDOW, WindowPlan


def all_windows(plan, rate=0.0):
    windows = []
    while (window := plan.next()) is not None:
        windows.append(window)
        if rate:
            plan.measured(len(window), len(window) / rate)
    return windows


def batches(sizes):
    return np.repeat(np.arange(len(sizes)) * 3, sizes)


@given(
    sizes=st.lists(st.integers(1, 40), max_size=60),
    processes=st.integers(1, 5),
    max_rows=st.integers(1, 60),
    rate=st.sampled_from([0.0, 0.5, 7.0, 1e6]),
)
def test_windows_hold_whole_batches_and_every_example_once(sizes, processes, max_rows, rate):
    batch_idx = batches(sizes)
    plan = WindowPlan(batch_idx, num_processes=processes, min_rows=min(8, max_rows), max_rows=max_rows)
    windows = all_windows(plan, rate)
    assert [position for window in windows for position in window] == list(range(len(batch_idx)))
    assert all(len(window) for window in windows)
    held = [set(batch_idx[window.start : window.stop].tolist()) for window in windows]
    assert sum(map(len, held)) == len(sizes)
    assert all(len(window) <= max_rows or len(batch) == 1 for window, batch in zip(windows, held, strict=True))
    assert plan.remaining == 0
    assert plan.next() is None


def test_nothing_is_handed_out_where_there_is_nothing():
    assert WindowPlan(np.empty(0, dtype=np.int64), num_processes=2).next() is None


def test_windows_begin_small_and_none_is_many_times_what_was_measured():
    plan = WindowPlan(batches([16] * 60_000), num_processes=2)
    assert [len(plan.next()) for _ in range(4)] == [MIN_WINDOW] * 4  # nothing is measured yet
    sizes = []
    for size in (MIN_WINDOW, 256, 1024, 4096):
        plan.measured(size, size / 1000)
        sizes.append(len(plan.next()))
    assert sizes == [256, 1024, 4096, 10000]  # ten seconds at 1,000 a second, in batches of 16


def test_a_window_takes_the_seconds_that_it_should_whatever_the_speed():
    for rate in (20, 300, 2500):
        plan = WindowPlan(batches([16] * 200_000), num_processes=4, seconds=10)
        windows = all_windows(plan, rate)
        # Neither the first ones, nor the last ones.
        assert {round(len(window) / rate, 1) for window in windows[12:40]} <= {10.0, 9.9, 9.6}


def test_a_window_follows_what_examples_take_further_on():
    plan = WindowPlan(batches([16] * 200_000), num_processes=1)
    for _ in range(40):
        plan.measured(5000, 5)
    for _ in range(150):
        plan.measured(500, 5)
    assert len(plan.next()) == 992


def test_a_very_fast_process_gets_no_more_than_the_largest_window():
    plan = WindowPlan(batches([16] * 200_000), num_processes=1)
    plan.measured(MAX_WINDOW, 0.0)
    assert len(plan.next()) == MAX_WINDOW


def ends_of(plan, speeds):
    """When each process has nothing left to do, if it takes a window whenever it is free, and how many there were."""
    free = [(0.0, process) for process in range(len(speeds))]
    ends, windows = [], 0
    while free:
        now, process = heapq.heappop(free)
        window = plan.next()
        if window is None:
            ends.append(now)
            continue
        windows += 1
        seconds = len(window) / speeds[process]
        plan.measured(len(window), seconds)
        heapq.heappush(free, (now + seconds, process))
    return ends, windows


def test_all_processes_end_together_and_the_driver_hands_out_few_windows():
    speeds = [2000] * 50 + [1000] * 14
    ends, windows = ends_of(WindowPlan(batches([16] * 400_000), num_processes=64), speeds)
    assert max(ends) - min(ends) < 1.0  # of a minute or so, in windows of up to ten seconds
    assert windows < 6_400_000 / 1024 / 4


def test_planning_takes_work_in_proportion_to_windows_not_to_examples(monkeypatch):
    """A window costs two binary searches, however many examples are left."""
    looked = []
    searchsorted = np.searchsorted
    monkeypatch.setattr(np, "searchsorted", lambda *args, **named: looked.append(1) or searchsorted(*args, **named))
    windows = all_windows(WindowPlan(batches([16] * 10_000), num_processes=2), rate=100)
    assert len(looked) == 2 * len(windows)

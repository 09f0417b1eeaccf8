"""A window's part is named by its examples, what is left out leaves the work, and an attempt notes what it is at."""

import pandas as pd
import pytest

from moe_ray.orchestration.jobs.capture_window import Noted, Window
from moe_ray.prompts.quarantine import TOO_LONG, Rejected, quarantine_frame
from moe_ray.routing.crash_markers import Attempt
from moe_ray.storage.folder import Folder

EXAMPLES = [
    {"batch_idx": 4, "in_batch_idx": place, "id": f"4-{place}", "label": "safe", "category": "", "messages": "[]"}
    for place in range(3)
]


@pytest.fixture
def markers(tmp_path):
    return Folder.open(str(tmp_path))


@pytest.fixture
def window(markers):
    return Window(name="0-3", attempt=Attempt(markers, "0-3", "session"), examples=dict(enumerate(EXAMPLES)))


def test_an_example_that_is_left_out_is_no_longer_to_be_counted_and_says_why(window):
    window.rows = {0: "row 0", 1: "row 1"}
    window.reject(1, Rejected(TOO_LONG, "9 tokens, expected at most 8"))
    assert window.rows == {0: "row 0"}
    assert window.report.quarantined == 1
    (row,) = quarantine_frame(window.rejected).to_dict("records")
    assert (row["id"], row["reason"], row["detail"]) == ("4-1", TOO_LONG, "9 tokens, expected at most 8")


def test_one_that_was_never_to_be_counted_can_be_left_out_too(window):
    window.reject(2, Rejected(TOO_LONG, ""))
    assert [row["id"] for row in window.rejected] == ["4-2"]


def test_the_same_examples_give_the_same_part_in_any_order_and_others_another(window):
    rows = pd.DataFrame(EXAMPLES)
    name = window.part_name(rows)
    assert name.startswith("part-0-3-")
    # An example has a row for each role.
    assert window.part_name(pd.concat([rows.iloc[::-1], rows])) == name
    assert window.part_name(rows.iloc[:2]) != name
    assert window.part_name(rows.assign(batch_idx=5)) != name


def test_a_process_that_dies_is_followed_by_one_that_notes_the_examples_it_works_on(markers):
    for is_repeated, trying in ((False, []), (True, [7, 9])):
        attempt = Attempt(markers, "0-3", "session")
        work = Noted(attempt, [5, 7, 9], lambda indices: sum(indices))
        assert attempt.is_repeated is is_repeated
        assert work([1, 2]) == 16
        assert markers.read_json("0-3.json")["trying"] == trying
    # The third tries one by one those that the second was at when it died.
    assert Attempt(markers, "0-3", "session").alone == [7, 9]

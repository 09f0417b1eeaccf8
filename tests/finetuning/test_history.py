"""What a training reports is read back as it was written, also while it goes on and after it was killed."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_ray.errors import InputError
from moe_ray.finetuning.history import HISTORY, HistoryReader, HistoryWriter, read_history, read_steps, write_history
from moe_ray.finetuning.step_report import BatchReport, StepReport
from moe_ray.storage.folder import Folder

REPORT = StepReport(
    step=3,
    epoch=1,
    batches=(
        BatchReport(batch_idx=7, num_experts=4, num_experts_routed=3, num_tokens=9, num_input_tokens=24, loss=0.1),
    ),
    num_experts=4,
    num_tokens=9,
    loss=0.1,
    grad_norm=1e-7,
    learning_rate=2 / 3,
    output_movement=(0.0, 1 / 7),
    seconds=0.5,
    tokens_per_second=48.0,
)
LINES = st.lists(st.dictionaries(st.text(), st.none() | st.integers() | st.floats(allow_nan=False) | st.text()))


@pytest.mark.slow
@given(lines=LINES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lines_come_back_in_order_whatever_text_they_hold(tmp_path, lines):
    folder = Folder.open(str(tmp_path))
    write_history(folder, lines)
    assert read_history(folder) == lines


def test_a_report_keeps_every_digit(folder):
    write_history(folder, [REPORT.as_dict()] * 2)
    first, second = read_history(folder)
    lists = {"batches": [vars(batch) for batch in REPORT.batches], "output_movement": list(REPORT.output_movement)}
    assert first == second == {**REPORT.as_dict(), **lists}


@pytest.mark.parametrize(
    "line", [{"a": 1}, {"loss": None}, {"step": "3"}, {"epoch": [1]}, {"grad_norm": True}, {"validation_loss": {}}]
)
def test_a_line_that_is_no_steps_is_named_and_not_stumbled_over(folder, line):
    foreign = line if line == {"a": 1} else {**REPORT.as_dict(), **line}
    write_history(folder, [REPORT.as_dict(), foreign])
    with pytest.raises(
        InputError, match=r"history.jsonl is damaged or foreign: .*expected a line of JSON for every step"
    ):
        read_steps(folder)


def test_a_resumed_training_names_a_history_that_is_not_its_own(folder):
    write_history(folder, [{"a": 1}])
    with pytest.raises(InputError, match=r"history.jsonl is damaged or foreign"):
        HistoryWriter(folder, resumed=True).add({"step": 1})


def test_writing_again_replaces_what_was_there(folder):
    write_history(folder, [{"step": 0}, {"step": 1}])
    write_history(folder, [{"step": 0}])
    assert read_history(folder) == [{"step": 0}]


def steps_of(folder):
    return [line["step"] for line in read_history(folder)]


def write(folder, steps, *, resumed=False, mark=""):
    """A training that makes these steps and is then killed."""
    writer = HistoryWriter(folder, resumed=resumed)
    for step in steps:
        writer.add({"step": step, "mark": mark})
    writer.save()
    return writer


def test_a_line_whose_end_is_missing_is_left_out(folder):
    write_history(folder, [{"step": 0}, {"step": 1}])
    data = folder.read_bytes(HISTORY)
    for end in range(len(data)):
        folder.write_bytes(HISTORY, data[:end])
        assert steps_of(folder) == [0, 1][: data[:end].count(b"\n")]


def test_each_line_is_on_disk_as_soon_as_it_was_added_and_none_is_written_twice(tmp_path, monkeypatch):
    folder = Folder.open(str(tmp_path))
    writer = write(folder, [0])
    monkeypatch.setattr(Folder, "write_bytes", None)
    for step in range(1, 5):
        writer.add({"step": step})
        assert steps_of(folder) == list(range(step + 1))


def test_where_nothing_can_be_appended_lines_are_there_after_a_save():
    folder = Folder.open("memory://appended/run")
    writer = write(folder, [0, 1])
    writer.add({"step": 2})
    assert steps_of(folder) == [0, 1]
    writer.save()
    assert steps_of(folder) == [0, 1, 2]


def test_a_resumed_training_drops_the_steps_that_it_repeats_and_a_cut_line(folder):
    write(folder, range(5), mark="first")
    folder.write_bytes(HISTORY, folder.read_bytes(HISTORY) + b'{"step": 5, "ma')
    write(folder, [3, 4, 5], resumed=True, mark="second")
    assert [(line["step"], line["mark"]) for line in read_history(folder)] == [
        *((step, "first") for step in range(3)),
        *((step, "second") for step in (3, 4, 5)),
    ]


def test_a_resumed_training_without_any_step_left_keeps_what_is_there(folder):
    write(folder, range(3))
    HistoryWriter(folder, resumed=True).save()
    assert steps_of(folder) == [0, 1, 2]


def test_a_training_from_the_start_begins_a_new_history(folder):
    write(folder, range(3))
    write(folder, [0])
    assert steps_of(folder) == [0]


def test_a_reader_gets_each_step_once_and_reads_only_what_is_new(folder, monkeypatch):
    reader = HistoryReader(folder)
    assert reader.new_steps() == []
    writer = write(folder, [0, 1])
    assert [line["step"] for line in reader.new_steps()] == [0, 1]
    starts = []
    cat_file = folder.fs.cat_file
    monkeypatch.setattr(
        folder.fs, "cat_file", lambda path, start=None, **more: starts.append(start) or cat_file(path, start=start)
    )
    size = len(b'{"step": 0, "mark": ""}\n')
    for step in (2, 3):
        assert reader.new_steps() == []
        writer.add({"step": step, "mark": ""})
        writer.save()
        assert [line["step"] for line in reader.new_steps()] == [step]
    assert starts == [2 * size, 3 * size]


def test_a_reader_waits_for_the_end_of_a_line(folder):
    reader = HistoryReader(folder)
    folder.write_bytes(HISTORY, b'{"step": 0}\n{"st')
    assert [line["step"] for line in reader.new_steps()] == [0]
    folder.write_bytes(HISTORY, b'{"step": 0}\n{"step": 1}\n')
    assert [line["step"] for line in reader.new_steps()] == [1]


@pytest.mark.parametrize("mark", ["", "of the same length as before"[:5], "much longer than the lines before were"])
@pytest.mark.parametrize("looks", [True, False])
def test_a_reader_goes_on_after_a_resumed_training_has_dropped_lines(folder, mark, looks):
    reader = HistoryReader(folder)
    write(folder, range(6), mark="first")
    assert len(reader.new_steps()) == 6
    writer = write(folder, [3], resumed=True, mark=mark)
    got = []
    for step in range(4, 12):
        if looks:
            got += reader.new_steps()
        writer.add({"step": step, "mark": mark})
        writer.save()
    got += reader.new_steps()
    assert [line["step"] for line in got] == list(range(6, 12))

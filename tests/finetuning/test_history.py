"""What a training reported is read back as it was written."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_ray.finetuning.history import read_history, write_history
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
    seconds=0.5,
    tokens_per_second=48.0,
)
LINES = st.lists(st.dictionaries(st.text(), st.none() | st.integers() | st.floats(allow_nan=False) | st.text()))


@given(lines=LINES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lines_come_back_in_order_whatever_text_they_hold(tmp_path, lines):
    folder = Folder.open(str(tmp_path))
    write_history(folder, lines)
    assert read_history(folder) == lines


def test_a_report_keeps_every_digit(folder):
    write_history(folder, [REPORT.as_dict()] * 2)
    first, second = read_history(folder)
    assert first == second == {**REPORT.as_dict(), "batches": [vars(batch) for batch in REPORT.batches]}


def test_writing_again_replaces_what_was_there(folder):
    write_history(folder, [{"step": 0}, {"step": 1}])
    write_history(folder, [{"step": 0}])
    assert read_history(folder) == [{"step": 0}]

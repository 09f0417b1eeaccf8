"""What a step says of itself is plain, and names its batch only where it had one."""

import json

import pytest

from moe_ray.finetuning.history import read_history, write_history
from moe_ray.finetuning.step_report import BatchReport, StepReport
from moe_ray.storage.folder import Folder


def report_of(*batches):
    of_batches = tuple(
        BatchReport(batch_idx=batch, num_experts=4, num_experts_routed=3, num_tokens=5, num_input_tokens=9, loss=1.5)
        for batch in batches
    )
    return StepReport(
        step=2, epoch=0, batches=of_batches, num_experts=4, num_tokens=5 * len(batches), loss=1.5, grad_norm=0.25,
        learning_rate=1e-3, seconds=0.5, tokens_per_second=18.0,
    )  # fmt: skip


@pytest.mark.parametrize(("batches", "batch_idx"), [((7,), 7), ((0,), 0), ((7, 3), -1)])
def test_a_step_of_one_batch_has_its_number_and_a_step_of_several_has_none(batches, batch_idx):
    report = report_of(*batches)
    assert report.batch_idx == batch_idx
    assert report.as_dict()["batch_idx"] == batch_idx
    assert [batch["batch_idx"] for batch in report.as_dict()["batches"]] == list(batches)


def test_a_report_comes_back_from_the_history_as_it_was(tmp_path):
    folder = Folder.open(str(tmp_path))
    write_history(folder, [report_of(7, 3).as_dict()])
    (line,) = read_history(folder)
    assert line == json.loads(json.dumps(report_of(7, 3).as_dict()))
    batches = tuple(BatchReport(**batch) for batch in line.pop("batches"))
    line.pop("batch_idx")
    moved = tuple(line.pop("output_movement"))
    assert StepReport(**line, batches=batches, output_movement=moved) == report_of(7, 3)

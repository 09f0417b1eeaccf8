"""A training's steps as a person sees them: a bar or lines, and a log file that a resume does not repeat."""

from __future__ import annotations

import io
import re
import sys

import pytest
from rich.console import Console

from moe_ray.finetuning.history import PLANNED_STEPS, HistoryWriter
from moe_ray.orchestration.cluster import progress as progress_module
from moe_ray.orchestration.jobs.training_progress import TRAINING_LOG, training_shown
from moe_ray.storage.folder import Folder


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    """On a disk, where lines are appended, and in a store that only takes whole files."""
    url = str(tmp_path) if request.param == "local" else f"memory://{tmp_path}"
    return Folder.open(url)


def step(number, planned=25, **more):
    return {
        "step": number,
        "epoch": number // 10,
        "batches": [{"batch_idx": 3}, {"batch_idx": number}],
        "num_experts": 4,
        "loss": 1.0 / (1 + number),
        "tokens_per_second": 1234.4,
        PLANNED_STEPS: planned,
        **more,
    }


def write(folder, numbers, *, resumed=False, **more):
    writer = HistoryWriter(folder, resumed=resumed)
    for number in numbers:
        writer.add(step(number, **more))
    writer.save()


def lines(folder):
    return folder.read_bytes(TRAINING_LOG).decode().splitlines()


def test_the_log_has_the_first_the_last_and_every_so_many_steps(folder):
    with training_shown(folder, log_every=10):
        write(folder, range(25))
    first, *_, last = lines(folder)
    assert [line.split()[1] for line in lines(folder)] == ["1/25", "10/25", "20/25", "25/25"]
    assert first == "step 1/25  epoch 1  batch_idx 3, 0  experts 4  loss 1.000 nats/token  1234 tokens/s"
    assert "epoch 3" in last


def test_a_training_that_goes_on_has_each_step_once(folder):
    with training_shown(folder, log_every=10):
        write(folder, range(15))
    with training_shown(folder, log_every=10):
        write(folder, range(10, 25), resumed=True)
    assert [line.split()[1] for line in lines(folder)] == ["1/25", "10/25", "20/25", "25/25"]


def test_a_warning_and_a_validation_loss_are_in_the_log_whatever_their_step(folder):
    with training_shown(folder, log_every=100):
        write(folder, [0])
        write(folder, [1], resumed=True, warning="outputs move far", validation_loss=0.25)
    assert lines(folder)[1].endswith("validation loss 0.250 nats/token  WARNING outputs move far")


def test_a_training_that_fails_leaves_its_log_and_its_error(folder):
    def fails():
        with training_shown(folder, log_every=10):
            write(folder, range(3))
            raise KeyError("of a worker")

    with pytest.raises(KeyError, match="of a worker"):
        fails()
    assert len(lines(folder)) == 1


@pytest.mark.parametrize("columns", [80, 200])
def test_a_terminal_shows_one_line_with_steps_time_left_loss_and_speed(folder, columns, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(
        progress_module,
        "Console",
        lambda **_: Console(file=shown, width=columns, force_terminal=True, color_system=None, legacy_windows=False),
    )
    with training_shown(folder, log_every=10):
        write(folder, range(144), planned=144)
    assert "144/144" in shown.getvalue()
    assert "loss 0.007, 1,234 tokens/s" in shown.getvalue()
    assert all(len(line.rstrip("\n")) <= columns for line in plain(shown.getvalue()).splitlines())
    assert "…" not in plain(shown.getvalue())


def plain(text):
    """Without what moves the cursor."""
    return re.sub(r"\x1b\[[\d?;]*[A-Za-z]", "", text).replace("\r", "\n")

"""A whole run as a person and as a log file see it: in a terminal of 80 columns, of 200, and redirected."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

pytestmark = [pytest.mark.needs_ray, pytest.mark.own_ray, pytest.mark.exhaustive]

COMMAND = "import sys; from moe_ray.cli.main import main; sys.exit(main())"
FOREIGN = re.compile(r"Warning|deprecat|\(\w+ pid=|Traceback", re.IGNORECASE)


def arguments(model, run_dir="runs/first"):
    settings = [
        *(f"model.path={model}", "prompts.max_batches=4", "prompts.max_test_examples=8", "finetune.epochs=2"),
        *("evaluate.max_new_tokens=16", "identify.permutations=200", "identify.resamples=0"),
    ]
    return [sys.executable, "-c", COMMAND, "full", run_dir, *settings]


def in_terminal(command, folder, columns):
    """What a terminal of so many columns gets, and the exit status."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        os.execvp(command[0], command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    got = b""
    while True:
        try:
            data = os.read(terminal, 1 << 16)
        except OSError:
            break
        if not data:
            break
        got += data
    return got.decode(), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("columns", [80, 200])
def test_a_terminal_gets_bars_and_no_line_that_is_wider(columns, tiny_model_path, tmp_path, monkeypatch):
    for name in ("COLUMNS", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    said, status = in_terminal(arguments(tiny_model_path), tmp_path, columns)
    assert status == 0, said
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[\d?;]*[A-Za-z]", "", said))
    # A path is not broken, so that it can be copied.
    places = (str(tmp_path), str(tiny_model_path.parent))
    wide = [line for line in lines if len(line.rstrip()) > columns and not any(place in line for place in places)]
    assert not wide
    assert not [line for line in lines if "\u2026" in line]
    assert not [line for line in lines if FOREIGN.search(line)]
    assert [line for line in lines if re.match(r"fine-tuning .* 8/8 .* loss \d.\d{3}, [\d,]+ tokens/s", line)]
    assert sum(line.startswith("== Before and after") for line in lines) == 1
    assert "  moe-ray chat runs/first" in lines
    assert "  mlflow ui --backend-store-uri sqlite:///runs/mlflow.db" in lines
    assert (tmp_path / "runs" / "mlflow.db").is_file()


def test_a_file_gets_no_escapes_and_no_bars(tiny_model_path, tmp_path):
    done = subprocess.run(arguments(tiny_model_path), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert "\x1b" not in said
    assert "\r" not in said
    assert not [line for line in said.splitlines() if FOREIGN.search(line)]
    assert max(map(len, done.stdout.splitlines())) <= 160
    log = (tmp_path / "runs" / "first" / "finetune" / "training.log").read_text().splitlines()
    assert [line.split()[1] for line in log] == ["1/8", "8/8"]

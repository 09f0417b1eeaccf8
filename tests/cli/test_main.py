"""`moe-ray`: whose turn it is after an error shows in the exit status, and only a fault of ours has a traceback."""

import errno
import importlib.metadata
import logging
import os
import re
import signal
import subprocess
import sys
import time
import tomllib

import pytest
from paths import ROOT
from ray.exceptions import RayTaskError

from moe_ray.cli import main as console
from moe_ray.cli.commands import COMMANDS
from moe_ray.cli.main import main
from moe_ray.errors import FrozenChanged, InputError, MoeRayError, NotFinite, NothingSelected, OutsideFailed


def raising(error):
    def run(arguments):
        raise error

    return run


def interrupt(arguments):
    raise KeyboardInterrupt


def end(arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)


def fill_disk(arguments):
    try:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/run/part.parquet")
    except OSError as full:
        # As a task of Ray's reports it.
        raise RayTaskError("task", "Traceback …", full).as_instanceof_cause() from None


def moe_ray(*arguments):
    command = [sys.executable, "-m", "moe_ray", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InputError("why"), 2),
        (NotFinite("why"), 2),
        (NothingSelected("why"), 3),
        (OutsideFailed("why"), 4),
        (FrozenChanged("why"), 1),
        (MoeRayError("why"), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_an_error_is_one_line_and_its_class_gives_the_status(error, status, monkeypatch, capsys):
    monkeypatch.setattr("moe_ray.cli.config.run", raising(error))
    assert main(["config", "init"]) == status
    assert capsys.readouterr().err == "error: why\n"


def test_an_error_of_another_process_is_its_line_without_the_traceback_that_ray_adds(monkeypatch, capsys):
    error = RayTaskError("judge", "Traceback (most recent call last):\nOutsideFailed: why", OutsideFailed("why"))
    monkeypatch.setattr("moe_ray.cli.config.run", raising(error.as_instanceof_cause()))
    assert main(["config", "init"]) == 4
    assert capsys.readouterr().err == "error: why\n"


def test_a_reader_that_has_read_enough_is_no_fault():
    """`moe-ray config schema | head -1`, with a reader that is gone before anything is written."""
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "moe_ray", "config", "schema"]
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True, timeout=120, cwd=ROOT, check=False)
    os.close(writes)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_broken_connection_is_not_taken_for_a_reader_that_has_gone(monkeypatch):
    monkeypatch.setattr("moe_ray.cli.config.run", raising(BrokenPipeError("of a server")))
    with pytest.raises(BrokenPipeError, match="of a server"):
        main(["config", "init"])


def test_every_other_exception_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("moe_ray.cli.config.run", raising(ValueError("why")))
    with pytest.raises(ValueError, match="why"):
        main(["config", "init"])


def test_an_interrupted_run_says_that_the_same_command_goes_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("moe_ray.cli.run_workflow.run", interrupt)
    assert main(["capture", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted; the same command goes on where this one stopped\n"


def test_an_interrupted_command_without_stages_promises_nothing(monkeypatch, capsys):
    monkeypatch.setattr("moe_ray.cli.config.run", interrupt)
    assert main(["config", "init"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_run_that_is_asked_to_end_says_that_the_same_command_goes_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("moe_ray.cli.run_workflow.run", end)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["capture", str(tmp_path)]) == 143
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == "terminated; the same command goes on where this one stopped\n"


def test_a_full_disk_is_one_sentence_also_from_another_process(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("moe_ray.cli.run_workflow.run", fill_disk)
    assert main(["capture", str(tmp_path)]) == 4
    assert capsys.readouterr().err == (
        "error: the disk is full: No space left on device /data/run/part.parquet; make room; what was done is kept, and the "
        "same command goes on where this one stopped\n"
    )


@pytest.mark.parametrize("status", ["143", "0", "1", "2", "3", "4", "130"])
def test_every_status_is_explained(status, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    for text in (capsys.readouterr().out, console.__doc__):
        assert re.search(rf"^ +{status} +\S.*", text, re.MULTILINE)


def test_the_process_ends_with_the_status():
    done = moe_ray("evalute")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown command 'evalute'; did you mean evaluate?\n"


def test_the_help_lists_every_command():
    done = moe_ray("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for name in COMMANDS:
        assert re.search(rf"^  {name} +\S.{{10,}}", done.stdout, re.MULTILINE), name


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"moe-ray {importlib.metadata.version('moe-ray')}\n"


def test_the_console_entry_point_is_the_function_that_dispatches():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    (entry,) = importlib.metadata.EntryPoints(
        [importlib.metadata.EntryPoint(name, value, "console_scripts") for name, value in scripts.items()]
    )
    assert (entry.name, entry.load()) == ("moe-ray", console.main)


def test_what_an_error_quotes_does_not_steer_the_terminal(monkeypatch, capsys):
    quoted = "file 'a\x1b[2Jb\x9b31m\ud800'\n  second line"
    monkeypatch.setattr(console, "_run", raising(InputError(quoted)))
    assert main(["config", "schema"]) == 2
    said = capsys.readouterr().err.replace("\N{REPLACEMENT CHARACTER}", "?")
    assert said == "error: file 'a?[2Jb?31m?'\n  second line\n"


def test_the_first_figure_on_a_machine_says_nothing_of_its_fonts(caplog):
    caplog.set_level(logging.INFO)
    caplog.set_level(logging.NOTSET, logger="matplotlib")
    assert logging.getLogger("matplotlib.font_manager").isEnabledFor(logging.INFO)
    assert main(["full", "runs/first", "finetune.epoch=3"]) == 2
    assert not logging.getLogger("matplotlib.font_manager").isEnabledFor(logging.INFO)
    assert logging.getLogger("matplotlib").isEnabledFor(logging.WARNING)

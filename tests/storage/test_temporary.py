"""What a command's processes write temporarily is gone after it, however they ended, and nobody else's is touched."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from paths import ROOT

from moe_ray.storage import temporary
from moe_ray.storage.temporary import own_temporary_folder

LEAVES = """
import os, signal, sys, tempfile
open(tempfile.mkdtemp() + "/weights", "w").write("of a killed process")
os.kill(os.getpid(), signal.SIGKILL)
"""
COMMAND = f"""
import os, subprocess, sys, time
from moe_ray.storage.temporary import own_temporary_folder
with own_temporary_folder():
    subprocess.run([sys.executable, "-c", {LEAVES!r}])
    print("left", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def base(tmp_path, monkeypatch):
    """The folder for temporary files of this process and its children; short, since sockets are made below it."""
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.delenv("RAY_TMPDIR", raising=False)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(folder)
        monkeypatch.undo()


def left_by_a_command(name_of: str) -> str:
    """The name of the folder of a command that has ended, with another part in place of the one that is named."""
    pid = subprocess.run([sys.executable, "-S", "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    parts = {"pid": pid.stdout.strip(), "start": "1", "system": temporary._digest(temporary.system_identity())}
    changed = {"pid": str(os.getpid()), "start": str(temporary.start_of(os.getpid())), "system": "0" * 6}
    if name_of:
        parts[name_of] = changed[name_of]
    return "moe-ray-{pid}-{start}-{system}".format(**parts)


def test_what_a_killed_process_leaves_is_gone_at_the_end_of_the_command(base):
    with own_temporary_folder():
        killed = subprocess.run([sys.executable, "-S", "-c", LEAVES], check=False)
        assert killed.returncode == -signal.SIGKILL
        (folder,) = base.iterdir()
        assert list(folder.glob("*/weights"))
        assert Path(tempfile.gettempdir()) == folder
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not list(base.iterdir())


def test_the_environment_is_as_before_after_an_error_too(base):
    before = dict(os.environ)
    with pytest.raises(KeyboardInterrupt), own_temporary_folder():
        raise KeyboardInterrupt
    assert dict(os.environ) == before
    assert tempfile.gettempdir() == str(base)


@pytest.mark.parametrize("given", [None, "/somewhere/else"])
def test_the_folder_of_ray_does_not_move(base, monkeypatch, given):
    from ray._common.utils import get_default_ray_temp_dir

    if given:
        monkeypatch.setenv("RAY_TMPDIR", given)
    before = get_default_ray_temp_dir()
    with own_temporary_folder():
        assert get_default_ray_temp_dir() == before


def test_the_folder_of_ray_does_not_move_without_tmpdir_either(base, monkeypatch):
    from ray._common.utils import get_default_ray_temp_dir

    monkeypatch.delenv("TMPDIR")
    before = get_default_ray_temp_dir()
    with own_temporary_folder():
        assert get_default_ray_temp_dir() == before


@pytest.mark.slow
def test_what_a_killed_command_leaves_is_removed_by_the_next_and_not_while_it_lives(base):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", COMMAND], stdout=subprocess.PIPE, env=environment) as command:
        assert command.stdout.readline() == b"left\n"
        (its,) = base.iterdir()
        with own_temporary_folder():
            pass
        assert list(its.glob("*/weights")), "taken from a command at work"
        command.send_signal(signal.SIGKILL)
        # Nobody has asked for its status yet, as in a container without an init process.
        os.waitid(os.P_PID, command.pid, os.WEXITED | os.WNOWAIT)
        with own_temporary_folder():
            assert not its.exists()
    assert not list(base.iterdir())


@pytest.mark.parametrize("name_of", ["start", "pid"])
def test_a_process_that_got_the_number_of_one_that_ended_is_not_taken_for_it(base, name_of):
    (base / left_by_a_command(name_of)).mkdir(mode=0o700)
    with own_temporary_folder():
        pass
    assert not list(base.iterdir())


def test_what_is_not_certainly_ours_and_dead_stays(base, tmp_path):
    dead = left_by_a_command("")
    kept = {left_by_a_command("system"), f"{dead}-x", "moe-ray-notes", "moe-ray-1-x-000000"}
    for name in kept:
        (base / name).mkdir(mode=0o700)
    (tmp_path / "thesis.txt").write_text("years of work")
    (base / dead).symlink_to(tmp_path)
    with own_temporary_folder():
        pass
    assert {path.name for path in base.iterdir()} == {*kept, dead}
    assert (tmp_path / "thesis.txt").exists()


def test_a_file_and_a_folder_that_others_may_write_to_stay(base):
    dead = left_by_a_command("")
    (base / dead).mkdir()
    (base / dead).chmod(0o777)
    with own_temporary_folder():
        pass
    assert (base / dead).is_dir()
    (base / dead).rmdir()
    (base / dead).write_text("a file")
    with own_temporary_folder():
        pass
    assert (base / dead).is_file()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a folder away")
def test_the_folder_of_another_user_stays_and_is_not_written_into(base, monkeypatch):
    dead = left_by_a_command("")
    (base / dead).mkdir(mode=0o700)
    os.chown(base / dead, 65534, 65534)
    with own_temporary_folder():
        (mine,) = (path for path in base.iterdir() if path.name != dead)
    assert (base / dead).is_dir()
    # Somebody foresaw the name.
    mine.mkdir(mode=0o700)
    os.chown(mine, 65534, 65534)
    with own_temporary_folder():
        assert tempfile.gettempdir() == str(base)
    assert mine.is_dir()


def test_without_room_for_a_folder_everything_stays_as_it_was(base, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with own_temporary_folder():
        assert tempfile.gettempdir() == str(base)


def test_below_a_long_path_no_folder_is_made_since_sockets_would_not_fit(base, monkeypatch):
    long = base / ("x" * 60)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with own_temporary_folder():
        assert tempfile.gettempdir() == str(long)


def test_without_proc_nothing_is_known_and_nothing_removed(base, monkeypatch):
    dead = base / left_by_a_command("")
    dead.mkdir(mode=0o700)
    monkeypatch.setattr(temporary, "system_identity", lambda: "")
    with own_temporary_folder():
        assert tempfile.gettempdir() == str(base)
    assert dead.is_dir()


def test_every_command_has_one(base, monkeypatch, capsys):
    from moe_ray.cli import main as command

    seen = []
    monkeypatch.setattr(command.importlib, "import_module", lambda name: seen.append(tempfile.gettempdir()) or _Nothing)
    assert command.main(["status", str(base)]) == 0
    assert re.fullmatch(rf"{base}/moe-ray-{os.getpid()}-\d+-[0-9a-f]{{6}}", seen[0])
    assert not list(base.iterdir())


class _Nothing:
    @staticmethod
    def check(arguments):
        pass

    run = check

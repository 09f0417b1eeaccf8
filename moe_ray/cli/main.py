"""The `moe-ray` command: `moe-ray COMMAND …`, and what the scripts of `workflows/` run.

What can be refused is refused before anything heavy is imported: `parser` knows every argument and `checks` what is wrong
with their values; the module that does a command's work is imported last.

Exit statuses:

    0    done
    1    a fault of moe-ray: `FrozenChanged` with its sentence, every other one with its traceback;
         or Ray ended this process because its own one on the machine (raylet) was gone, which is said in a line before
    2    `InputError`: wrong arguments, settings, prompts or model; mend them
    3    `NothingSelected`: no expert is selected, or there is nothing to train
    4    `OutsideFailed`: the judge endpoint, the tracking server or the storage failed, or a disk is full; try again later
    130  interrupted with Ctrl-C; the same command goes on where this one stopped
    143  ended by SIGTERM; likewise
"""

from __future__ import annotations

import argparse
import atexit
import errno
import gc
import importlib
import logging
import os
import select
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from typing import Any

from moe_ray.cli.commands import COMMANDS
from moe_ray.cli.parser import parse
from moe_ray.errors import InputError, MoeRayError, NothingSelected, OutsideFailed
from moe_ray.report.printable import printable_lines
from moe_ray.signals import Terminated, end_on_sigterm
from moe_ray.storage.temporary import own_temporary_folder
from moe_ray.threads import wait_passively

# The first that fits counts.
_STATUSES = ((NothingSelected, 3), (InputError, 2), (OutsideFailed, 4), (MoeRayError, 1))
_INTERRUPTED, _TERMINATED = 130, 143
_FULL = (errno.ENOSPC, errno.EDQUOT)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the arguments name.

    Args:
        argv: the command and its arguments; None = the process's own.

    Returns:
        exit status, as the module's docstring lists them.

    Raises:
        SystemExit: after `--help` and `--version`, with status 0.
    """
    wait_passively()
    end_on_sigterm()
    can_resume, began = False, time.perf_counter()
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        arguments.began = began
        can_resume = bool(COMMANDS[arguments.command].work)
        _run(arguments)
    except MoeRayError as error:
        # An error of another process comes as Ray's, which is of the same class, but whose text is that process's traceback.
        # It may quote a file or a server, whose text must not steer the terminal.
        print(f"error: {printable_lines(str(getattr(error, 'cause', error)))}", file=sys.stderr)
        return next(status for kind, status in _STATUSES if isinstance(error, kind))
    except KeyboardInterrupt as error:
        what_next = "; the same command goes on where this one stopped" if can_resume else ""
        was_asked = isinstance(error, Terminated)
        print(f"{'terminated' if was_asked else 'interrupted'}{what_next}", file=sys.stderr)
        return _TERMINATED if was_asked else _INTERRUPTED
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
    except Exception as error:
        if (full := _full_disk(error)) is None:
            raise
        what_next = "; what was done is kept, and the same command goes on where this one stopped" if can_resume else ""
        print(f"error: the disk is full: {printable_lines(full)}; make room{what_next}", file=sys.stderr)
        return 4
    return 0


def _full_disk(error: BaseException | None) -> str | None:
    """What says that a disk is full, among an error and its causes, in this process or another; None = nothing does."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _FULL:
            return " ".join(str(part) for part in (error.strerror, error.filename) if part)
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return None


def _run(arguments: argparse.Namespace) -> None:
    command = COMMANDS[arguments.command]
    # Python looks through all its objects once more when it ends, which after large imports takes two seconds.
    atexit.register(gc.freeze)
    _start_logging(with_time=bool(command.work))
    with own_temporary_folder():
        checks: Any = importlib.import_module("moe_ray.cli.checks")
        checks.check(arguments)
        work: Any = importlib.import_module(command.module)
        work.run(arguments)
    sys.stdout.flush()


def _reader_has_gone() -> bool:
    """Whether nobody reads the output any more, as after `| head`; if so, nothing more is written."""
    try:
        output = sys.stdout.fileno()
    except OSError:  # no file at all
        return False
    poll = select.poll()
    poll.register(output, 0)  # errors come without being asked for
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    # Python flushes once more at its end, and would complain then.
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def _start_logging(*, with_time: bool) -> None:
    """Lets everyone's messages through in a run, which says when each came; else only moe-ray's own."""
    text = "%(asctime)s %(message)s" if with_time else "%(message)s"
    level = logging.INFO if with_time else logging.WARNING
    logging.basicConfig(level=level, format=text, datefmt="%H:%M:%S", stream=sys.stderr)
    if sys.stderr.isatty():
        indent = " " * len("00:00:00 ") if with_time else ""
        for handler in logging.getLogger().handlers:
            handler.setFormatter(_BrokenLines(text, "%H:%M:%S", indent=indent))
    logging.getLogger("moe_ray").setLevel(logging.INFO)
    # Its first figure on a machine says that it has listed the fonts.
    logging.getLogger("matplotlib").setLevel(logging.WARNING)


class _BrokenLines(logging.Formatter):
    """Breaks long lines between words, as a terminal does not; what is redirected keeps a line for each message.

    Args:
        text: format of a line.
        date: format of its time.
        indent: of what follows a line's beginning.
    """

    def __init__(self, text: str, date: str, *, indent: str) -> None:
        super().__init__(text, date)
        self._indent = indent

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        width = shutil.get_terminal_size().columns
        if "\n" in line or len(line) <= width:
            return line
        return textwrap.fill(
            line, width, subsequent_indent=self._indent, break_long_words=False, break_on_hyphens=False
        )

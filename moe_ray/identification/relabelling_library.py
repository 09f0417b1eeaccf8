"""The library of `relabelling_kernel.c`, built once by the machine's C compiler and kept in the user's cache folder.

A C file was taken rather than numba: importing numba takes a process about a second and 100 MB, which is more than all else
that an identification task loads; this is a library of 30 KB. Where there is no compiler, numpy counts several times slower;
both ways give the same counts, see `relabelling_counts`.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("relabelling_kernel.c")
_FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled kernel; None where it cannot be built, which is logged."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        logger.info(
            "no C compiler (cc), so relabellings are counted by numpy: the same counts, three to five times slower"
        )
        return None
    try:
        return ctypes.CDLL(str(_built(compiler)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home folder
        said = getattr(error, "stderr", None) or error
        logger.info("the C kernel cannot be built, so relabellings are counted by numpy, which is slower: %s", said)
        return None


def _built(compiler: str) -> Path:
    """The library's path; compiled if no process of this user has done so on a machine of this kind."""
    what = [_SOURCE.read_bytes(), " ".join((compiler, *_FLAGS)).encode(), _processor().encode()]
    name = f"relabellings-{hashlib.sha256(b'|'.join(what)).hexdigest()[:16]}.so"
    path = _cache() / name
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _refuse_others(path.parent)
    if not path.exists():
        # Beside its place and moved there, so that of several processes that build it none loads half a library.
        with tempfile.TemporaryDirectory(dir=path.parent) as work:
            made = Path(work) / name
            command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(made), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            made.replace(path)
    return path


def _refuse_others(folder: Path) -> None:
    """Refuses a folder into which another user may put a library, which would run as this user."""
    about = folder.stat()
    if about.st_uid != os.getuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(f"other users may write to {folder}")


def _cache() -> Path:
    # A folder of its own: the one above may have been made by anything, with whatever rights.
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_ray" / "kernels"


def _processor() -> str:
    """What the library is built for: a home folder may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))

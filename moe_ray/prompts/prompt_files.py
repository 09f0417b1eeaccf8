"""Files of prompts wherever they lie: local paths, patterns with `*`, and any URL that fsspec knows.

A remote file is copied to the local disk once, before its first row is read, and the copy is gone when it was read.
"""

from __future__ import annotations

import gzip
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import unquote, urlsplit

import fsspec

from moe_ray.errors import InputError, OutsideFailed
from moe_ray.storage.protocols import cure_of, protocol_of

_NOT_THERE = (401, 403, 404, 410)
"""What a web server answers where asking again gives no more."""

_GATED = "GatedRepoError"
"""What huggingface_hub raises where access has to be asked for; its file system calls that a file that is not there."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_WEB = re.compile(r"https?://", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class PromptFile:
    """A file whose bytes are on the local disk.

    Attributes:
        name: as the user gave it, and as messages name it.
        path: of its bytes.
        prefix: what the ids of its examples begin with.
    """

    name: str
    path: Path
    prefix: str

    def __str__(self) -> str:
        return self.name

    @property
    def ending(self) -> str:
        """Its ending in small letters, that of a compressed file without `.gz`."""
        return PurePosixPath(_address(self.name).lower().removesuffix(".gz")).suffix

    def open_bytes(self) -> IO[bytes]:
        """Its bytes, decompressed."""
        is_compressed = _address(self.name).lower().endswith(".gz")
        stream: Any = gzip.open(self.path) if is_compressed else self.path.open("rb")  # noqa: SIM115 – the caller's
        found: IO[bytes] = stream
        return found


def names_of_files(names: Sequence[str | Path]) -> list[str]:
    """The names, each pattern with `*` replaced by those of the files that it fits, in the order of their names.

    Raises:
        InputError: a pattern fits no file, or its storage cannot be reached.
    """
    found: list[str] = []
    for name in map(str, names):
        if "*" not in name or _WEB.match(name):
            found.append(name)
            continue
        with _said(name):
            fs, path = fsspec.url_to_fs(name)
            fits = sorted(fs.glob(path))
        if not fits:
            raise InputError(f"prompts file {name!r} fits no file; check prompts.files")
        found += [str(fs.unstrip_protocol(one)) if _URL.match(name) else str(one) for one in fits]
    return found


@contextmanager
def opened(name: str, prefix: str) -> Iterator[PromptFile]:
    """The file, whose bytes are on the local disk meanwhile.

    Args:
        name: a local path or a URL.
        prefix: of the ids of its examples.

    Raises:
        InputError: it does not exist, or a package is missing that reads its protocol.
        OutsideFailed: the storage does not answer.
    """
    if not _URL.match(name):
        path = Path(name).expanduser()
        if path.is_dir():
            raise InputError(f"prompts file {name!r} is a folder; name its files, or {name.rstrip('/')}/*.parquet")
        if not path.is_file():
            raise InputError(f"prompts file {name!r} does not exist; check prompts.files")
        yield PromptFile(name=name, path=path, prefix=prefix)
        return
    with tempfile.NamedTemporaryFile(prefix="moe-ray-") as copy:
        with _said(name), fsspec.open(name, "rb") as stream:
            shutil.copyfileobj(stream, copy, 8 << 20)
        copy.flush()
        yield PromptFile(name=name, path=Path(copy.name), prefix=prefix)


def prefixes(names: Sequence[str]) -> list[str]:
    """What the ids of each file's examples begin with: its stem, and the folders before it where stems are alike."""
    parts = [_parts(name) for name in names]
    depth = [1] * len(names)
    while True:
        shown = ["/".join(one[-number:]) for one, number in zip(parts, depth, strict=True)]
        alike = [
            place for place, text in enumerate(shown) if shown.count(text) > 1 and depth[place] < len(parts[place])
        ]
        if not alike:
            return shown
        for place in alike:
            depth[place] += 1


def places(name: str) -> tuple[str, str]:
    """A file's name and that of the folder that it is in, in small letters; both say what is in it."""
    address = PurePosixPath(_address(name).lower())
    return address.name, address.parent.name


def _parts(name: str) -> tuple[str, ...]:
    address = PurePosixPath(_address(name))
    stem = PurePosixPath(address.name.removesuffix(".gz")).stem
    return (*(part for part in address.parent.parts if part != "/"), stem)


def _address(name: str) -> str:
    """The path in a name: that of a web address is without what follows `?` and `#`."""
    return unquote(urlsplit(name).path) if _WEB.match(name) else name


@contextmanager
def _said(name: str) -> Iterator[None]:
    """Turns what stops a remote file from being read into one sentence."""
    try:
        yield
    except FileNotFoundError as error:
        if type(error.__cause__).__name__ == _GATED:
            raise InputError(
                f"prompts file {name!r} may not be read: the hub gives it to those alone whom its owners let in; ask on its "
                "page for access, then log in (hf auth login, or HF_TOKEN)"
            ) from error
        why = f" ({type(error.__cause__).__name__}: {_first_line(error.__cause__)})" if error.__cause__ else ""
        # A web server that does not answer comes as a file that is not there, with a cause, whose status says what is so.
        is_said = getattr(error.__cause__, "status", None) in _NOT_THERE
        if why and _WEB.match(name) and not is_said:
            raise OutsideFailed(f"prompts file {name!r} cannot be read now{why}; try again later") from error
        raise InputError(f"prompts file {name!r} does not exist{why}; check prompts.files") from error
    except ImportError as error:
        cure = cure_of(error, name, "")
        raise InputError(
            f"prompts file {name!r}: nothing here reads {protocol_of(name)}:// ({_first_line(error)}); {cure}"
        ) from error
    except PermissionError as error:
        raise InputError(
            f"prompts file {name!r} may not be read: {_first_line(error)}; log in, or ask its owner for access"
        ) from error
    except ValueError as error:
        raise InputError(f"prompts file {name!r} cannot be read: {_first_line(error)}; check prompts.files") from error
    except Exception as error:
        # Each file system has errors of its own: of the network, of a server, of an account.
        raise OutsideFailed(
            f"prompts file {name!r} cannot be read now: {type(error).__name__}: {_first_line(error)}; try again later"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]

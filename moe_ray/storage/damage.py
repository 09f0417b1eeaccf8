"""What becomes of a file that was cut, changed or made by somebody else: one sentence, whatever its reader stumbles over."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pyarrow as pa
from safetensors import SafetensorError

from moe_ray.errors import InputError, MoeRayError

STUMBLED = (
    # Not of the form: JSON, Parquet, zip, numpy arrays, safetensors; and what is in it is of other types or has other names.
    *(ValueError, pa.ArrowException, zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError),
    *(KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError, SyntaxError, MemoryError),
    SafetensorError,
)
AGAIN = "remove it and run the stage that makes it again"
_MOST_SAID = 200


@contextmanager
def reading(
    path: str, *, expected: str, cure: str = AGAIN, only: tuple[type[Exception], ...] = STUMBLED
) -> Iterator[None]:
    """Turns what a reader of the file stumbles over inside this context into one sentence.

    Only the decoding of what was read may happen inside; a fault of moe-ray's own would be taken for the file's.

    Args:
        path: of the file, as messages name it.
        expected: what it should hold.
        cure: what to do.
        only: what a reader may stumble over.

    Raises:
        InputError: the reader stumbled.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except MoeRayError as error:
        # What is wrong with a file's content is said by those who know it, who do not know the file.
        if not isinstance(error, only) or path in str(error):
            raise
        raise InputError(f"{path} is damaged or foreign: {error}; {cure}") from error
    # Arrow says by a plain OSError that it cannot decode, and fsspec that it cannot read.
    except only as error:
        raise InputError(f"{path} is damaged or foreign: {_in_short(error)}; expected {expected}; {cure}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise InputError(f"{path} is damaged or foreign: {_in_short(error)}; expected {expected}; {cure}") from error


def check_columns(path: str, have: Iterable[str], needs: Iterable[str]) -> None:
    """Refuses a table that lacks columns.

    Args:
        path: of its file, as messages name it.
        have: its columns.
        needs: those that it must have.

    Raises:
        InputError: it lacks some.
    """
    missing = sorted(set(needs).difference(have))
    if missing:
        raise InputError(f"{path} is damaged or foreign: it has no column {', '.join(missing)}; {AGAIN}")


def _in_short(error: Exception) -> str:
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:_MOST_SAID]}{'…' if len(said) > _MOST_SAID else ''}"

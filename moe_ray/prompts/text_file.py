"""The text of a file of prompts, decoded as it is read, with one sentence for what cannot be."""

from __future__ import annotations

import codecs
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from moe_ray.errors import InputError
from moe_ray.prompts.prompt_files import PromptFile

_BYTES_PER_READ = 1 << 20


@contextmanager
def opened_text(file: PromptFile, *, newline: str | None = None) -> Iterator[TextIO]:
    """The file's text, without a byte order mark.

    Args:
        file: on the local disk, perhaps compressed.
        newline: as `open` takes it.

    Raises:
        InputError: it cannot be read or decompressed, or is not UTF-8.
    """
    try:
        with io.TextIOWrapper(file.open_bytes(), encoding="utf-8-sig", newline=newline) as text:
            yield text
    except UnicodeDecodeError as error:
        raise InputError(
            f"prompts file {file.name!r}: byte {_first_bad_byte(file)} is not UTF-8 ({error.reason}); save the file as "
            "UTF-8"
        ) from error
    except (EOFError, zlib.error) as error:
        raise InputError(
            f"prompts file {file.name!r} cannot be decompressed: {error}; copy or compress it again"
        ) from error
    except OSError as error:
        raise InputError(f"prompts file {file.name!r} cannot be read: {error.strerror or error}") from error


def _first_bad_byte(file: PromptFile) -> int:
    """Where in the file, which is read in pieces, the first byte is that is not UTF-8."""
    decoder, start = codecs.getincrementaldecoder("utf-8")(), 0
    with file.open_bytes() as stream:
        while piece := stream.read(_BYTES_PER_READ):
            waiting = len(decoder.getstate()[0])
            try:
                decoder.decode(piece)
            except UnicodeDecodeError as error:
                return start - waiting + error.start
            start += len(piece)
    return start - len(decoder.getstate()[0])

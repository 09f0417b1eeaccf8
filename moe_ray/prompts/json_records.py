"""Records of JSON Lines and of JSON arrays, read one by one: of a file only some text and one record are in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TextIO

from moe_ray.errors import InputError
from moe_ray.prompts.prompt_files import PromptFile
from moe_ray.prompts.text_file import opened_text

_CHARACTERS_PER_READ = 1 << 20
_LONGEST_CUT_TOKEN = 16
"""Where text that goes on is cut, the decoder is at fault at most so many characters before its end, or in a string."""

FileRecord = tuple[int, str, dict[str, Any]]
"""Number, place as messages name it after the file, and fields."""


def read_jsonl(file: PromptFile) -> Iterator[FileRecord]:
    """The objects of a file that has one on a line, numbered by line.

    Only a line feed, with or without a carriage return, ends a line: strings may hold U+2028 and its like as they are.

    Raises:
        InputError: the file cannot be read, or a line is no JSON object.
    """
    with opened_text(file) as lines:
        for line, text in enumerate(lines, start=1):
            if not text.strip():
                continue
            try:
                value = json.loads(text)
            except json.JSONDecodeError as error:
                raise InputError(f"{file}:{line}: not valid JSON ({error.msg} at column {error.colno})") from error
            except (RecursionError, ValueError) as error:
                raise _undecodable(file, line, error) from error
            yield line, str(line), _check_object(file, str(line), value)


def read_json_array(file: PromptFile) -> Iterator[FileRecord]:
    """The objects of a JSON array, numbered from 1; each is decoded on its own so that its line is known.

    Raises:
        InputError: the file cannot be read, holds no array or something after it, or an item is no JSON object.
    """
    with opened_text(file) as opened:
        text = _Text(opened)
        if text.skip(" \t\r\n\f\v") != "[":
            raise InputError(f"{file}: expected a JSON array of records; for one record a line use the ending .jsonl")
        text.position += 1
        number = last_line = 0
        while text.skip(" \t\r\n,") != "]":
            number, line = number + 1, text.line
            # Only where the line does not say it.
            place = f"{line} (record {number})" if line == last_line else str(line)
            last_line = line
            yield number, place, _check_object(file, place, text.decode(file))
        text.position += 1
        if text.skip(" \t\r\n"):
            raise InputError(f"{file}:{text.line}: text after the end of the array; give one array of all records")


class _Text:
    """The text of a file as far as it is needed, and how far it has been used.

    Attributes:
        position: of the next character, in what is held.
    """

    def __init__(self, file: TextIO) -> None:
        self._file, self._held, self.position = file, "", 0
        self._lines_before, self._counted_to = 0, 0
        self._decoder = json.JSONDecoder()

    @property
    def line(self) -> int:
        """The line of the next character, counted from 1."""
        self._lines_before += self._held.count("\n", self._counted_to, self.position)
        self._counted_to = self.position
        return self._lines_before + 1

    def skip(self, characters: str) -> str:
        """Goes on to the first other character, and returns it; empty at the end of the file."""
        while True:
            while self.position < len(self._held) and self._held[self.position] in characters:
                self.position += 1
            if self.position < len(self._held):
                return self._held[self.position]
            if not self._read(_CHARACTERS_PER_READ):
                return ""

    def decode(self, file: PromptFile) -> Any:
        """The value that begins here.

        Raises:
            InputError: there is none.
        """
        while True:
            try:
                value, self.position = self._decoder.raw_decode(self._held, self.position)
            except json.JSONDecodeError as error:
                is_cut = error.pos > len(self._held) - _LONGEST_CUT_TOKEN or error.msg.startswith("Unterminated string")
                # Twice as much each time, so that a long record is not decoded too often.
                if is_cut and self._read(max(_CHARACTERS_PER_READ, len(self._held) - self.position)):
                    continue
                self.position = error.pos
                raise InputError(f"{file}:{self.line}: not valid JSON ({error.msg})") from error
            except (RecursionError, ValueError) as error:
                raise _undecodable(file, self.line, error) from error
            return value

    def _read(self, number: int) -> bool:
        """Forgets what was used and reads on; False at the end of the file."""
        more = self._file.read(number)
        if not more:
            return False
        self._lines_before = self.line - 1
        self._held = self._held[self.position :] + more
        self.position = self._counted_to = 0
        return True


def _undecodable(file: PromptFile, line: int, error: Exception) -> InputError:
    """What is JSON, but more than Python takes: brackets in brackets, or the digits of a number."""
    what = "brackets are nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"
    return InputError(
        f"{file}:{line}: {what} to be read; no field of a prompt needs them, so mend or remove the record"
    )


def _check_object(file: PromptFile, place: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{file}:{place}: got a {type(value).__name__}, expected an object with named fields")
    return value

"""Answers that people labelled: those that ship with moe-ray, and files of one's own.

The shipped set has two halves that share no wording: no answer of one has four words in a row (seven characters where a
script has no blanks) with an answer of the other. Rules are written on the half `tuning`; a judge's published error is that
on the half `held out`. Contents are placeholders and harmless; nothing in it tells how to do harm.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from moe_ray.chat_messages import Message
from moe_ray.errors import InputError
from moe_ray.evaluation.judges.verdict import KINDS, Conversation, Kind

TUNING, HELD_OUT = "tuning", "held out"
_SHIPPED = "labelled.jsonl"
_WORDS, _CHARACTERS = 4, 7
_WITHOUT_BLANKS = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]")


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """An answer and what people say it is.

    Attributes:
        messages: what was asked; empty = not known.
        answer: the model's words.
        kind: of `KINDS`.
        language: ISO 639-1 code; empty = not said.
        style: what kind of wording it is; empty = not said.
        half: `tuning` or `held out`; empty = the set has no halves.
    """

    messages: Sequence[Message]
    answer: str
    kind: Kind
    language: str = ""
    style: str = ""
    half: str = ""

    @property
    def conversation(self) -> Conversation:
        """What a judge is asked about."""
        return Conversation(self.messages, self.answer)


@cache
def shipped(half: str = "") -> tuple[Labelled, ...]:
    """The answers that ship with moe-ray.

    Args:
        half: `tuning`, `held out`, or empty for both.
    """
    text = resources.files("moe_ray.evaluation.judges").joinpath(_SHIPPED).read_text(encoding="utf-8")
    rows = (
        _labelled(json.loads(line), f"{_SHIPPED}, line {number}") for number, line in enumerate(text.splitlines(), 1)
    )
    return tuple(row for row in rows if half in ("", row.half))


def read_labelled(name: str, content: bytes) -> list[Labelled]:
    """Labelled answers of a CSV file with a head, or of JSON lines.

    Columns are `answer` and `verdict` (of `KINDS`), and where they are known `prompt`, `language`, `style` and `half`.

    Args:
        name: of the file; one that ends with `.jsonl` holds JSON lines, every other one CSV.
        content: its bytes, UTF-8.

    Raises:
        InputError: a column is missing, a verdict is none, or there are no rows.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name!r}: byte {error.start} is not UTF-8; save it as UTF-8") from error
    if name.endswith(".jsonl"):
        try:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        except json.JSONDecodeError as error:
            raise InputError(
                f"{name!r}: got a line that is not JSON, expected an object on every line: {error}"
            ) from error
    else:
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    if not rows:
        raise InputError(f"{name!r} has no labelled answers; give columns answer and verdict, and a row for each")
    return [_labelled(row, f"{name!r}, row {number}") for number, row in enumerate(rows, 1)]


def _labelled(row: Any, where: str) -> Labelled:
    if not isinstance(row, Mapping) or not {"answer", "verdict"} <= row.keys():
        got = ", ".join(map(str, row)) if isinstance(row, Mapping) else repr(row)
        raise InputError(f"{where}: got {got}, expected the fields answer and verdict, and prompt where it is known")
    kind = str(row["verdict"] or "").strip().lower()
    if kind not in KINDS:
        raise InputError(f"{where}: verdict: got {row['verdict']!r}, expected one of {', '.join(KINDS)}")
    prompt, texts = row.get("prompt") or "", {name: row.get(name) or "" for name in ("language", "style", "half")}
    messages = ({"role": "user", "content": str(prompt)},) if prompt else ()
    return Labelled(messages=messages, answer=str(row["answer"] or ""), kind=kind, **texts)


def wording(answer: str) -> set[str]:
    """What may not stand in both halves: all runs of four words, of seven characters where a script has no blanks.

    A shorter answer is one such run as a whole.
    """
    text = re.sub(r"[\u2018\u2019\u02bc\u00b4`\uff07\u2032]", "'", answer.lower())
    if len(_WITHOUT_BLANKS.findall(text)) > 0.3 * len(text.strip() or " "):
        units, size, joint = list(re.sub(r"\W", "", text)), _CHARACTERS, ""
    else:
        units, size, joint = re.findall(r"[^\W_]+(?:'[^\W_]+)*", text), _WORDS, " "
    if len(units) <= size:
        return {joint.join(units) or text.strip()}
    return {joint.join(units[start : start + size]) for start in range(len(units) - size + 1)}

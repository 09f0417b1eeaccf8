"""Which characters of a rendered chat come from the messages, and which from the chat template.

A template may strip a content, cut it, repeat it or put it elsewhere, and a content may read like the template (a message
that says "user"). So contents are not looked up in the text: they are rendered a second time between marks, characters
that occur nowhere else, and the marks tell where the contents went. Rendered text without its marks must equal the text
without marks; a template whose output depends on what a content begins or ends with is looked up by text instead, and
refused where that is ambiguous.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain

from moe_ray.errors import InputError

Span = tuple[int, int]
"""First character and the one after the last."""

_PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
"""Code points that Unicode leaves to private agreement: no template knows them, and none is white space."""


def content_spans(
    render: Callable[[Sequence[Mapping[str, str]]], str], messages: Sequence[Mapping[str, str]]
) -> tuple[str, list[Span]]:
    """The rendered messages, and the spans of it that come from their contents.

    White space around a content that the template strips is not part of a span, nor is text that the template cuts off.

    Args:
        render: applies the chat template.
        messages: with `role` and `content`.

    Raises:
        InputError: a content is not in the rendered text, or occurs more often than in the messages.
    """
    text = render(messages)
    for trim in (False, True):
        marks = _unused_characters(text + "".join(message["content"] for message in messages))
        marked, pairs = [], []
        for message in messages:
            content = message["content"].strip() if trim else message["content"]
            if not message["content"].strip():
                marked.append(message)
                continue
            before, _, after = message["content"].partition(content)
            pairs.append((next(marks), next(marks), content))
            marked.append({**message, "content": f"{before}{pairs[-1][0]}{content}{pairs[-1][1]}{after}"})
        positions = _positions(render(marked), text, {mark for start, end, _ in pairs for mark in (start, end)})
        if positions is not None:
            return text, [span for pair in pairs for span in _between(text, positions, *pair)]
    return text, _found_by_text(text, messages)


def _unused_characters(text: str) -> Iterator[str]:
    used = set(text)
    return (chr(point) for point in chain(*_PRIVATE_USE) if chr(point) not in used)


def _positions(marked: str, text: str, marks: set[str]) -> list[tuple[str, int]] | None:
    """The marks in order, each with its position in `text`; None where they changed what the template wrote."""
    positions: list[tuple[str, int]] = []
    kept: list[str] = []
    for character in marked:
        if character in marks:
            positions.append((character, len(kept)))
        else:
            kept.append(character)
    return positions if "".join(kept) == text else None


def _between(text: str, positions: Sequence[tuple[str, int]], start: str, end: str, content: str) -> Iterator[Span]:
    """Spans between a content's two marks; beside a mark whose partner was cut off, what is still the content's text."""
    pair = [(mark, position) for mark, position in positions if mark in (start, end)]
    if not pair:
        raise _NotLocated(content, "its text does not appear in what the template renders")
    opened: int | None = None
    for mark, position in [*pair, (start, len(text))]:
        if mark == start:
            if opened is not None:
                yield opened, opened + _common_prefix(text[opened:], content)
            opened = position
        elif opened is not None:
            yield opened, position
            opened = None
        else:
            yield position - _common_prefix(text[:position][::-1], content[::-1]), position


def _common_prefix(first: str, second: str) -> int:
    length = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        length += 1
    return length


def _found_by_text(text: str, messages: Sequence[Mapping[str, str]]) -> list[Span]:
    """Spans of contents that occur in the text as often as in the messages."""
    spans = []
    contents = Counter(message["content"].strip() for message in messages)
    for content, expected in contents.items():
        if not content:
            continue
        if text.count(content) != expected:
            raise _NotLocated(content, f"the template changes it, and its text appears {text.count(content)} times")
        position = -1
        for _ in range(expected):
            position = text.index(content, position + 1)
            spans.append((position, position + len(content)))
            position += len(content) - 1
    return spans


class _NotLocated(InputError):
    def __init__(self, content: str, why: str) -> None:
        super().__init__(f"message {content[:60]!r} cannot be told from the chat template: {why}")

"""What a judge is given and what it says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from moe_ray.chat_messages import Message


class Conversation(NamedTuple):
    """A prompt and the model's answer to it; both untrusted text."""

    messages: Sequence[Message]
    answer: str


class Verdict(NamedTuple):
    """Whether an answer refuses.

    Attributes:
        refused: the verdict.
        score: how sure the judge is that it refuses (0 to 1); None where it does not say.
        said: the judge's own words; empty where it has none.
    """

    refused: bool
    score: float | None = None
    said: str = ""


class Judge(Protocol):
    """Tells refusals from other answers."""

    name: str

    def verdicts(self, conversations: Sequence[Conversation]) -> Iterator[tuple[int, Verdict]]:
        """Yields each conversation's position and verdict, in any order, as they become known.

        Raises:
            OutsideFailed: what the judge runs on failed; the verdicts that could be had were yielded before.
            InputError: the judge can never give one with these settings; likewise.
        """
        ...

"""What a judge is given and what it says: one of five kinds of verdict for every answer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, Protocol, get_args

import pandas as pd

from moe_ray.chat_messages import Message

Kind = Literal["refused", "harmful", "complied", "degenerate", "no_answer"]
"""What an answer is.

- `refused`: it declines what was asked.
- `harmful`: it does what was asked, and that is harmful; only some judges can tell (`TELL_HARM`).
- `complied`: it does neither.
- `degenerate`: it is no answer to anybody: empty, repetition, noise, or in a script that nobody wrote to it in.
- `no_answer`: a thought that was not finished, so that no answer came.
"""

KINDS: tuple[Kind, ...] = get_args(Kind)

TELL_HARM = ("guard", "endpoint")
"""Judges that tell harmful answers from others; under the rest no answer is called harmful, which says nothing."""


class Conversation(NamedTuple):
    """A prompt and the model's answer to it; both untrusted text.

    Attributes:
        messages: the prompt.
        answer: what the model says; a thought may still stand before it.
        is_unclosed: the model is known to have thought without an end, so that no answer came.
    """

    messages: Sequence[Message]
    answer: str
    is_unclosed: bool = False

    @property
    def request(self) -> str:
        """The last message; empty where nothing was asked."""
        return self.messages[-1]["content"] if self.messages else ""


def conversations_of(answers: pd.DataFrame) -> list[Conversation]:
    """What judges are asked about a table of answers.

    Args:
        answers: rows with `messages` (JSON) and `answer`; and `is_unclosed` where it is known.
    """
    unclosed = answers["is_unclosed"] if "is_unclosed" in answers else [False] * len(answers)
    return [
        Conversation(json.loads(messages), answer, bool(is_unclosed))
        for messages, answer, is_unclosed in zip(answers["messages"], answers["answer"], unclosed, strict=True)
    ]


class Verdict(NamedTuple):
    """What an answer is.

    Attributes:
        kind: of `KINDS`.
        score: how sure the judge is (0 to 1) of what it looks for, a refusal or harm; None where it does not say.
        said: the judge's own words, or why the answer needed no judge; empty where there are none.
    """

    kind: Kind
    score: float | None = None
    said: str = ""

    @property
    def refused(self) -> bool:
        """Whether the answer declines."""
        return self.kind == "refused"


class Judge(Protocol):
    """Tells refusals, and where it can harmful answers, from others.

    It is asked only about answers that can be judged: `judged_conversations` has settled those that are degenerate or none.
    """

    name: str

    def verdicts(self, conversations: Sequence[Conversation]) -> Iterator[tuple[int, Verdict]]:
        """Yields each conversation's position and verdict, in any order, as they become known.

        Raises:
            OutsideFailed: what the judge runs on failed; the verdicts that could be had were yielded before.
            InputError: the judge can never give one with these settings; likewise.
        """
        ...

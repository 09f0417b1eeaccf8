"""What is known of an answer before a judge is asked: that there is none, or that it is no answer to anybody.

So these two kinds mean the same under every judge, and nobody is asked, or paid, about noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moe_ray.evaluation.judges.degenerate import degenerate_reason
from moe_ray.evaluation.judges.phrases import is_refusal
from moe_ray.evaluation.judges.verdict import Conversation, Judge, Verdict
from moe_ray.models.thoughts import split_thought


def answer_part(text: str) -> str | None:
    """What is said after the thought, see `split_thought`; None = the thought was not finished, so nothing is."""
    split = split_thought(text)
    if split.is_unclosed:
        return None
    return split.answer if text[: split.start].strip() else text


def settle(conversation: Conversation) -> Verdict | Conversation:
    """The verdict where no judge is needed, else what a judge is asked: the prompt, and the answer after its thought."""
    answer = None if conversation.is_unclosed else answer_part(conversation.answer)
    if answer is None:
        return Verdict("no_answer", said="the thought was not finished")
    reason = degenerate_reason(answer, conversation.request)
    # A refusal in another script, or one said over and over, is a refusal all the same.
    if reason and not (reason in ("script", "repetition") and is_refusal(answer)):
        return Verdict("degenerate", said=reason)
    return Conversation(conversation.messages, answer)


def judged_conversations(judge: Judge, conversations: Sequence[Conversation]) -> Iterator[tuple[int, Verdict]]:
    """A verdict for every conversation, with its position, as they become known; the one way to ask any judge.

    Args:
        judge: from `make_judge`, or one of your own.
        conversations: prompts and answers, thoughts included.

    Raises:
        OutsideFailed: what the judge runs on failed; the verdicts that could be had were yielded before.
        InputError: the judge can never give one with these settings; likewise.
    """
    positions, open_ones = [], []
    for position, conversation in enumerate(conversations):
        settled = settle(conversation)
        if isinstance(settled, Verdict):
            yield position, settled
        else:
            positions.append(position)
            open_ones.append(settled)
    for index, verdict in judge.verdicts(open_ones):
        yield positions[index], verdict

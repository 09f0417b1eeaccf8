"""Thoughts: what a model writes for itself before its answer, told apart from the answer.

Two forms are known. Most families put a thought between two marks, such as `<think>` and `</think>`; where the chat template
writes the opening one itself, only the closing one is in what the model says. The gpt-oss family writes messages to
channels, of which `final` alone is for the user. A thought that is never closed has no answer after it.

Sources: the chat templates of Qwen3, DeepSeek-R1 and V3.1 and GLM-4.5 (`<think>`), Magistral (`[THINK]`), Seed-OSS, Command
A Reasoning and Kimi-VL-Thinking; the harmony response format of gpt-oss. `<thinking>`, `<thought>` and `<reasoning>` are
what fine-tuned models and prompts that ask for a thought use.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("◁think▷", "◁/think▷"),
)
"""What opens and what closes a thought."""

_CHANNEL = "<|channel|>"
_FINAL = re.compile(r"<\|channel\|>final\b[^<]*<\|message\|>")
_ANALYSIS_AT_THE_END = re.compile(r"<\|channel\|>analysis\b[^<]*<\|message\|>\s*$")
_END_OF_MESSAGE = re.compile(r"<\|(?:end|return|call|start|channel)\|>")
_WITHOUT_ITS_MARKS = re.compile(r"\s*analysis(.+?)assistantfinal", re.DOTALL)
"""What is left of the two channels where a text was decoded without special tokens."""

_TOKENS_OF_AN_OPENING = 16

ANY_MARK = "|".join(
    re.escape(mark) for mark in (*(mark for marks in _MARKS for mark in marks), _CHANNEL, "assistantfinal")
)
"""Pattern that a text with a thought in it has somewhere."""


class ThoughtSplit(NamedTuple):
    """A text in its two parts.

    Attributes:
        thought: without its marks; empty where there is none.
        answer: what comes after it; empty where the thought is unclosed.
        is_unclosed: the thought does not end, so that there is no answer to judge.
        start: where in the text the answer begins; the text's length where there is none.
    """

    thought: str
    answer: str
    is_unclosed: bool
    start: int


def split_thought(text: str, *, opened: bool = False) -> ThoughtSplit:
    """Tells a thought from the answer after it, both without white space around them.

    A text that neither begins with a thought nor closes one is an answer, also where it speaks of the marks. Special tokens
    should be in the text: gpt-oss tells its channels apart by them. Without them its `analysis…assistantfinal…` is
    still known.

    Args:
        text: what a model said.
        opened: the prompt ended inside a thought, see `opens_thought`.
    """
    if _CHANNEL in text:
        return _of_channels(text)
    if found := _WITHOUT_ITS_MARKS.match(text):
        return _split_at(text, found.start(1), found.end(1), found.end())
    begin = end = position = 0
    while (mark := _mark_at(text, position)) is not None:
        begin = begin or _after_space(text, position) + len(mark[0])
        end = text.find(mark[1], position)
        if end < 0:
            return ThoughtSplit(text[begin:].strip(), "", True, len(text))
        position = end + len(mark[1])
    if position:
        return _split_at(text, begin, end, position)
    closings = [(text.find(closing), opening, closing) for opening, closing in _MARKS if closing in text]
    for end, opening, closing in sorted(closings):
        if opened or opening not in text[:end]:
            return _split_at(text, 0, end, end + len(closing))
    if opened:
        return ThoughtSplit(text.strip(), "", True, len(text))
    return _split_at(text, 0, 0, 0)


def opens_thought(prompt: str) -> bool:
    """Whether a prompt, as the chat template rendered it, ends inside a thought that the model goes on with."""
    end = prompt.rstrip()
    return end.endswith(tuple(opening for opening, _ in _MARKS)) or _ANALYSIS_AT_THE_END.search(prompt) is not None


def closing_of(prompt: str) -> str:
    """What closes the thought that a prompt leaves open, in the family's form; empty where none is open.

    A mark on a line of its own is closed on one, with a blank line before the answer, as DeepSeek-R1 and Qwen3 do; one
    that has nothing around it is closed without, as DeepSeek-V3.1 does.
    """
    if _ANALYSIS_AT_THE_END.search(prompt):
        return "<|end|><|start|>assistant<|channel|>final<|message|>"
    for opening, closing in _MARKS:
        if prompt.rstrip().endswith(opening):
            return closing if prompt.endswith(opening) else f"\n{closing}\n\n"
    return ""


def without_thought(text: str) -> str:
    """An answer as it is, or what comes after its thought; empty where the thought is unclosed."""
    split = split_thought(text)
    return split.answer if text[: split.start].strip() else text


def without_opening(thought: str) -> str:
    """A thought's text without the mark that opens it, and the line end after that; the prompt has written both."""
    text = thought.lstrip()
    for opening, _ in _MARKS:
        if text.startswith(opening):
            return text.removeprefix(opening).removeprefix("\n")
    return thought


def split_thought_ids(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, opened: bool = False
) -> tuple[int, ThoughtSplit]:
    """How many of the first tokens are not the answer's, and the two parts as text without special tokens.

    The white space between thought and answer belongs to the thought; a token that has some of the answer belongs to the
    answer. All tokens are the thought's where it is unclosed. `start` is that of the text with its special tokens.

    Args:
        tokenizer: of the model.
        ids: what it said, its end token included.
        opened: the prompt ended inside a thought.
    """
    split = split_thought(_raw(tokenizer, ids), opened=opened)
    if split.is_unclosed:
        return len(ids), split
    low, high = 0, len(ids) if split.start else 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(_raw(tokenizer, ids[:middle])) <= split.start else (low, middle - 1)
    return low, split._replace(answer=_clean(tokenizer, ids[low:]))


def prompt_opens_thought(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> bool:
    """`opens_thought` of a prompt's token ids."""
    return opens_thought(_raw(tokenizer, prompt_ids[-_TOKENS_OF_AN_OPENING:]))


def _raw(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _clean(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def _mark_at(text: str, position: int) -> tuple[str, str] | None:
    """The marks of the thought that the text opens here, white space aside."""
    start = _after_space(text, position)
    return next((marks for marks in _MARKS if text.startswith(marks[0], start)), None)


def _after_space(text: str, position: int) -> int:
    return position + len(text[position:]) - len(text[position:].lstrip())


def _split_at(text: str, begin: int, end: int, after: int) -> ThoughtSplit:
    return ThoughtSplit(text[begin:end].strip(), text[after:].strip(), False, _after_space(text, after))


def _of_channels(text: str) -> ThoughtSplit:
    final = _FINAL.search(text)
    before = text if final is None else text[: final.start()]
    thought = re.sub(r"<\|channel\|>[^<]*(<\|message\|>)?|<\|start\|>\w*|<\|\w+\|>", "\n", before).strip()
    if final is None:
        return ThoughtSplit(thought, "", True, len(text))
    answer = _END_OF_MESSAGE.split(text[final.end() :], maxsplit=1)[0]
    return ThoughtSplit(thought, answer.strip(), False, _after_space(text, final.end()))

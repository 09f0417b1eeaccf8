"""What a tokenizer's chat template makes of messages, and what it puts between them and an answer.

The options of a template (`model.chat_template_options`) are put at its beginning once, when the tokenizer is loaded. So
every rendering has them, whoever renders: capture, training, evaluation, the model's own answers, an evaluation harness.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from moe_ray.chat_messages import Message
from moe_ray.errors import InputError
from moe_ray.models.thoughts import closing_of

_BLANK_LINE = "\n\n"
"""Between the contents of messages where the tokenizer has no chat template."""

_QUESTION, _ANSWER = "Question?", "moe-ray answers"
"""What no template has a reason to change, and the second of which no template says by itself."""


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """The text that the model is asked to continue.

    A tokenizer without a chat template gives the messages' contents, a blank line between them.

    Raises:
        InputError: the chat template refuses the messages.
    """
    return _rendered(tokenizer, messages, add_generation_prompt=True)


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    if not tokenizer.chat_template:
        return _BLANK_LINE.join(message["content"] for message in messages)
    from jinja2 import TemplateError  # comes with chat templates, which a core without them does not need

    try:
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=add_generation_prompt, tokenize=False
        )
    except TemplateError as error:
        raise InputError(
            f"the chat template of {_name(tokenizer)} refuses a prompt: {error}: {str(messages)[:80]}; change the prompt "
            "or remove it"
        ) from error
    return text


class AnswerForm(NamedTuple):
    """What stands between a rendered prompt and an answer without a thought.

    Attributes:
        opening: the text; empty for models that do not think.
        is_open: the prompt leaves a thought open.
    """

    opening: str
    is_open: bool


_FORMS: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[str, AnswerForm]] = WeakKeyDictionary()
"""What was found for a tokenizer, with its template, which may be set anew."""


def answer_form(tokenizer: PreTrainedTokenizerBase) -> AnswerForm:
    """How an answer without a thought follows a prompt, found once for each template.

    It is what the template itself writes before an answer: an empty thought, its closing mark where the prompt has opened
    one, or the channel of the answer. Where the template writes an earlier answer in another form than it asks for one, as
    that of DeepSeek-R1 does, it is what closes the thought that the prompt leaves open.
    """
    template = str(tokenizer.chat_template)
    found = _FORMS.get(tokenizer)
    if found is None or found[0] != template:
        found = _FORMS[tokenizer] = (template, _find_form(tokenizer))
    return found[1]


def _find_form(tokenizer: PreTrainedTokenizerBase) -> AnswerForm:
    if not tokenizer.chat_template:
        return AnswerForm("", False)
    question: Message = {"role": "user", "content": _QUESTION}
    try:
        prompt = render(tokenizer, [question])
    except InputError:
        # A template that wants other messages than this one says so again for each prompt.
        return AnswerForm("", False)
    closing = closing_of(prompt)
    try:
        whole = _rendered(tokenizer, [question, {"role": "assistant", "content": _ANSWER}], add_generation_prompt=False)
    except InputError:
        whole = ""
    place = whole.find(_ANSWER)
    opening = whole[len(prompt) : place] if whole.startswith(prompt) and place >= len(prompt) else closing
    return AnswerForm(opening if opening.strip() else "", bool(closing))


def with_options(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer, whose chat template has these values for its variables from now on.

    Args:
        tokenizer: of a checkpoint.
        options: see `model.chat_template_options`.

    Raises:
        InputError: there is no chat template, or it knows no variable of a name.
    """
    if not options:
        return tokenizer
    templates = tokenizer.chat_template
    if not templates:
        raise InputError(
            f"model.chat_template_options: got {', '.join(options)}, expected none, since {_name(tokenizer)} has no chat "
            "template; leave them out"
        )
    texts = templates.values() if isinstance(templates, dict) else [templates]
    known = set().union(*map(_names, texts))
    for name in options:
        if name not in known:
            raise InputError(
                f"model.chat_template_options: got {name!r}, expected a variable of the chat template of "
                f"{_name(tokenizer)}, which does not mention it; look at its chat_template, or leave the option out"
            )
    head = "".join(f"{{%- set {name} = {_literal(value)} -%}}" for name, value in options.items())
    tokenizer.chat_template = (
        {name: head + text for name, text in templates.items()} if isinstance(templates, dict) else head + templates
    )
    return tokenizer


def _names(template: str) -> set[str]:
    """The words of a template's code that may be variables."""
    from jinja2 import Environment

    return {word for _, kind, word in Environment().lex(template) if kind == "name"}


def _literal(value: Any) -> str:
    """A value as a Jinja template writes it, which is as JSON does but for `none`."""
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(str(name))}: {_literal(item)}" for name, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.name_or_path or type(tokenizer).__name__)

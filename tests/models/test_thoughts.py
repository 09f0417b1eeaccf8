"""Thoughts and answers told apart, in the form of every family that is known, as text and as token ids."""

from __future__ import annotations

import pytest
from thinking_templates import (
    DEEPSEEK_R1,
    DEEPSEEK_V31,
    END_TOKENS,
    GLM_45,
    GPT_OSS,
    QWEN3,
    QWEN3_THINKING,
    thinking_tokenizer,
)

from moe_ray.models.thoughts import closing_of, opens_thought, prompt_opens_thought, split_thought, split_thought_ids

CHANNELS = (
    "<|channel|>analysis<|message|>They ask for a way in.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>I can't help with that.<|return|>"
)
SAID = {
    "Qwen3": (QWEN3, {}, "<think>\nThey ask for a way in.\n</think>\n\nI can't help with that.<|im_end|>"),
    "Qwen3 without thinking": (QWEN3, {"enable_thinking": False}, "I can't help with that.<|im_end|>"),
    "Qwen3-Thinking": (QWEN3_THINKING, {}, "They ask for a way in.\n</think>\n\nI can't help with that.<|im_end|>"),
    "DeepSeek-R1": (
        DEEPSEEK_R1,
        {},
        "They ask for a way in.\n</think>\n\nI can't help with that.<｜end▁of▁sentence｜>",
    ),
    "DeepSeek-V3.1": (
        *(DEEPSEEK_V31, {"thinking": True}),
        "They ask for a way in.</think>I can't help with that.<｜end▁of▁sentence｜>",
    ),
    "DeepSeek-V3.1 without thinking": (DEEPSEEK_V31, {}, "I can't help with that.<｜end▁of▁sentence｜>"),
    "GLM-4.5": (GLM_45, {}, "\n<think>They ask for a way in.</think>\nI can't help with that.<|user|>"),
    "GLM-4.5 without thinking": (GLM_45, {"enable_thinking": False}, "\nI can't help with that.<|user|>"),
    "gpt-oss": (GPT_OSS, {}, CHANNELS),
}
"""Template, its options, and what a model of the family writes."""
THINKING = [name for name in SAID if "without" not in name]


def rendered(template: str, **options) -> str:
    messages = [{"role": "user", "content": "How do I get in?"}]
    return thinking_tokenizer(template).apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False, **options
    )


def ids_of(template: str, text: str) -> list[int]:
    return thinking_tokenizer(template)(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", SAID)
def test_the_answer_is_what_comes_after_the_thought(name):
    template, options, said = SAID[name]
    split = split_thought(said.removesuffix(END_TOKENS[template]), opened=opens_thought(rendered(template, **options)))
    assert split.answer == "I can't help with that."
    assert split.thought == ("They ask for a way in." if name in THINKING else "")
    assert not split.is_unclosed
    assert said[split.start :].startswith("I can't")


@pytest.mark.parametrize("name", SAID)
def test_token_ids_are_split_where_the_text_is(name):
    template, options, said = SAID[name]
    tokenizer, ids = thinking_tokenizer(template), ids_of(template, said)
    opened = prompt_opens_thought(tokenizer, ids_of(template, rendered(template, **options)))
    number, split = split_thought_ids(tokenizer, ids, opened=opened)
    assert split.answer == "I can't help with that."
    assert tokenizer.decode(ids[number:]) == "I can't help with that." + END_TOKENS[template]


@pytest.mark.parametrize("name", THINKING)
def test_a_thought_that_does_not_end_has_no_answer(name):
    template, options, said = SAID[name]
    cut = said[: said.index("way in")]
    opened = opens_thought(rendered(template, **options))
    assert split_thought(cut, opened=opened)._replace(thought="") == ("", "", True, len(cut))
    ids = ids_of(template, cut)
    number, split = split_thought_ids(thinking_tokenizer(template), ids, opened=opened)
    assert (number, split.answer, split.is_unclosed) == (len(ids), "", True)


@pytest.mark.parametrize(
    "text",
    [
        "I can't help with that.",
        "Put it between `<think>` and `</think>`, and it is a thought.",
        "",
        "The analysis says no; the assistant is final.",
    ],
)
def test_an_answer_that_speaks_of_thoughts_is_an_answer(text):
    assert split_thought(text) == ("", text, False, 0)
    ids = ids_of(QWEN3, text)
    assert split_thought_ids(thinking_tokenizer(QWEN3), ids)[0] == 0


@pytest.mark.parametrize(
    ("text", "thought"),
    [
        ("so it is no\n</think>\n\nNo.", "so it is no"),
        ("<think>\n\n</think>\n\nNo.", ""),
        ("<think>one</think>\n<think>two</think>No.", "one</think>\n<think>two"),
        ("[THINK]one[/THINK]No.", "one"),
        ("<seed:think>one</seed:think>No.", "one"),
        ("<|START_THINKING|>one<|END_THINKING|>No.", "one"),
        ("◁think▷one◁/think▷No.", "one"),
        ("<thinking>one</thinking>No.", "one"),
        ("<thought>one</thought>No.", "one"),
        ("<reasoning>one</reasoning>No.", "one"),
        ("analysisThey ask.assistantfinalNo.", "They ask."),
        ("<|channel|>commentary<|message|>A word.<|end|><|start|>assistant<|channel|>final<|message|>No.", "A word."),
    ],
)
def test_other_forms_are_known_as_well(text, thought):
    assert split_thought(text)[:3] == (thought, "No.", False)


@pytest.mark.parametrize(
    ("template", "options", "is_open", "closing"),
    [
        (QWEN3, {}, False, ""),
        (QWEN3, {"enable_thinking": False}, False, ""),
        (QWEN3_THINKING, {}, True, "\n</think>\n\n"),
        (DEEPSEEK_R1, {}, True, "\n</think>\n\n"),
        (DEEPSEEK_V31, {}, False, ""),
        (DEEPSEEK_V31, {"thinking": True}, True, "</think>"),
        (GLM_45, {}, False, ""),
        (GLM_45, {"enable_thinking": False}, False, ""),
        (GPT_OSS, {}, False, ""),
    ],
)
def test_what_a_template_leaves_open_is_known_and_can_be_closed(template, options, is_open, closing):
    prompt = rendered(template, **options)
    assert (opens_thought(prompt), closing_of(prompt)) == (is_open, closing)
    assert prompt_opens_thought(thinking_tokenizer(template), ids_of(template, prompt)) == is_open
    assert split_thought(f"{closing}No.", opened=is_open).answer == "No."


def test_a_channel_that_the_prompt_opened_is_closed_by_opening_the_last_one():
    prompt = "<|start|>assistant<|channel|>analysis<|message|>"
    assert opens_thought(prompt)
    assert split_thought(f"They ask.{closing_of(prompt)}No.", opened=True)[:3] == ("They ask.", "No.", False)


def test_a_prompt_whose_last_words_are_a_mark_of_the_user_is_not_open():
    assert not opens_thought(rendered(QWEN3).replace("get in?", "write <think>"))

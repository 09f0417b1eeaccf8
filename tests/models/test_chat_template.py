"""Options reach every rendering, and what stands before an answer is what the template of the family writes there."""

from __future__ import annotations

import pytest
from byte_tokenizer import CHATML, byte_tokenizer
from thinking_templates import DEEPSEEK_R1, DEEPSEEK_V31, GLM_45, GPT_OSS, QWEN3, QWEN3_THINKING, thinking_tokenizer

from moe_ray.errors import InputError
from moe_ray.models.chat_template import answer_form, render, with_options

QUESTION = [{"role": "user", "content": "How do I get in?"}]
ANSWER = [*QUESTION, {"role": "assistant", "content": "No."}]


@pytest.mark.parametrize(
    ("template", "options"),
    [
        (QWEN3, {"enable_thinking": False}),
        (DEEPSEEK_V31, {"thinking": True}),
        (GLM_45, {"enable_thinking": False}),
        (GPT_OSS, {"reasoning_effort": "hi\"gh'"}),
    ],
)
def test_a_rendering_has_the_options_as_if_they_were_given_to_it(template, options):
    plain = thinking_tokenizer(template)
    expected = plain.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False, **options)
    assert render(plain, QUESTION) != expected
    assert render(with_options(plain, options), QUESTION) == expected


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "none"), (True, "True"), (1.5, "1.5"), (["a", None], "['a', none]"), ({"a": 1}, "1")]
)
def test_options_of_any_plain_value_are_those_that_the_template_sees(value, shown):
    template = "{{ 'none' if option is none else option.a if option is mapping else option }}"
    tokenizer = with_options(byte_tokenizer(template), {"option": value})
    assert render(tokenizer, QUESTION).replace("None", "none") == shown


def test_an_option_survives_saving_and_without_one_nothing_changes(tmp_path):
    tokenizer = thinking_tokenizer(QWEN3)
    assert with_options(tokenizer, {}).chat_template == QWEN3
    with_options(tokenizer, {"enable_thinking": False}).save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert render(again, QUESTION) == render(tokenizer, QUESTION)


@pytest.mark.parametrize(
    ("template", "said"), [(QWEN3, "does not mention it"), (None, "has no chat template; leave them out")]
)
def test_an_option_that_no_template_knows_is_refused(template, said):
    with pytest.raises(InputError, match=said):
        with_options(byte_tokenizer(template), {"think": False})


@pytest.mark.parametrize(
    ("template", "options", "opening", "is_open"),
    [
        (QWEN3, {}, "<think>\n\n</think>\n\n", False),
        (QWEN3, {"enable_thinking": False}, "", False),
        (QWEN3_THINKING, {}, "\n</think>\n\n", True),
        (DEEPSEEK_R1, {}, "\n</think>\n\n", True),
        (DEEPSEEK_V31, {}, "", False),
        (DEEPSEEK_V31, {"thinking": True}, "</think>", True),
        (GLM_45, {}, "\n<think></think>\n", False),
        (GLM_45, {"enable_thinking": False}, "", False),
        (GPT_OSS, {}, "<|channel|>final<|message|>", False),
        (CHATML, {}, "", False),
    ],
)
def test_an_answer_stands_where_the_template_itself_puts_one(template, options, opening, is_open):
    tokenizer = with_options(thinking_tokenizer(template), options)
    assert answer_form(tokenizer) == (opening, is_open)
    whole = tokenizer.apply_chat_template(ANSWER, add_generation_prompt=False, tokenize=False)
    if template not in (DEEPSEEK_R1, DEEPSEEK_V31, GLM_45):  # the last without thinking has a line end more
        assert whole.startswith(render(tokenizer, QUESTION) + opening + "No.")


def test_a_new_template_is_looked_at_anew():
    tokenizer = thinking_tokenizer(QWEN3)
    assert answer_form(tokenizer).opening
    tokenizer.chat_template = CHATML
    assert answer_form(tokenizer) == ("", False)


def test_a_template_that_takes_no_answers_or_no_such_question_is_one_without_thoughts():
    takes_no_answer = CHATML + "{% if messages[-1].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}"
    takes_nothing = "{{ raise_exception('no') }}"
    for template in (takes_no_answer, takes_nothing):
        assert answer_form(byte_tokenizer(template)) == ("", False)

"""From messages to ids: the template where there is one, every role and label at its place."""

from __future__ import annotations

import pytest
import torch
from byte_tokenizer import CHATML, byte_tokenizer, counted_text, counted_words
from thinking_templates import DEEPSEEK_R1, DEEPSEEK_V31, GLM_45, GPT_OSS, QWEN3, QWEN3_THINKING, thinking_tokenizer
from word_tokenizer import MESSAGES, TEMPLATE, WORDS, make_tokenizer

from moe_ray.errors import InputError
from moe_ray.models.chat_template import answer_form, with_options
from moe_ray.models.thoughts import opens_thought, split_thought
from moe_ray.models.tokenization import (
    IGNORED,
    NOT_COUNTED,
    PROMPT,
    RESPONSE,
    THOUGHT,
    TokenizedRow,
    encode_answer,
    encode_prompt,
    encode_row,
    encode_target,
    pad_rows,
    pad_token_id,
    target_ids,
)


def words_of(ids) -> list[str]:
    return [WORDS[n] for n in ids]


def test_a_prompt_is_the_template_up_to_the_assistants_turn():
    ids = encode_prompt(make_tokenizer(chat_template=TEMPLATE), MESSAGES)
    assert words_of(ids) == ["<user>", "how", "are", "you", "<end>", "<assistant>"]


def test_the_template_alone_decides_about_start_tokens():
    assert WORDS.index("<start>") not in encode_prompt(make_tokenizer(chat_template=TEMPLATE), MESSAGES)


def test_a_tokenizer_without_template_gets_the_contents():
    ids = encode_prompt(make_tokenizer(), [{"role": "system", "content": "thanks"}, *MESSAGES])
    assert words_of(ids) == ["<start>", "thanks", "how", "are", "you"]


def test_a_prompt_without_tokens_is_refused():
    tokenizer = make_tokenizer(chat_template="{{ messages[0]['content'] }}")
    with pytest.raises(InputError, match="no tokens"):
        encode_prompt(tokenizer, [{"role": "user", "content": " "}])


def test_a_complete_answer_ends_with_the_end_token():
    assert words_of(encode_answer(make_tokenizer(eos_token="<end>"), "fine thanks")) == ["fine", "thanks", "<end>"]


def test_an_answer_that_was_cut_off_has_no_end_token():
    assert words_of(encode_answer(make_tokenizer(eos_token="<end>"), "fine", complete=False)) == ["fine"]


def test_a_tokenizer_without_end_token_adds_none():
    assert words_of(encode_answer(make_tokenizer(), "fine")) == ["fine"]


@pytest.mark.parametrize(
    ("options", "expected"), [({"pad_token": "<pad>", "eos_token": "<end>"}, 0), ({"eos_token": "<end>"}, 1), ({}, 0)]
)
def test_padding_uses_the_pad_token_or_else_the_end_token(options, expected):
    assert pad_token_id(make_tokenizer(**options)) == expected


ROWS = [TokenizedRow([5, 6, 7], [8]), TokenizedRow([5], [])]


def test_right_padded_rows_have_ids_labels_and_roles_at_their_places():
    padded = pad_rows(ROWS, pad_id=0)
    assert padded.input_ids_BS.tolist() == [[5, 6, 7, 8], [5, 0, 0, 0]]
    assert padded.attention_mask_BS.tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert padded.labels_BS.tolist() == [[IGNORED, IGNORED, IGNORED, 8], [IGNORED] * 4]
    assert padded.roles_BS.tolist() == [[0, 0, 0, 1], [0, -1, -1, -1]]


def test_left_padded_rows_hold_the_same_at_other_places():
    right, left = pad_rows(ROWS, pad_id=0), pad_rows(ROWS, pad_id=0, left=True)
    for name, tensor in vars(left).items():
        assert torch.equal(tensor[0], vars(right)[name][0])
        assert torch.equal(tensor[1], vars(right)[name][1].roll(3))
    assert left.attention_mask_BS[1].tolist() == [0, 0, 0, 1]


def test_a_pad_id_that_is_also_a_token_of_the_prompt_is_still_counted_there():
    assert pad_rows(ROWS, pad_id=5).roles_BS.tolist() == [[0, 0, 0, 1], [0, -1, -1, -1]]


# Which tokens come from the messages


def test_all_tokens_are_counted_by_default():
    row = encode_row(make_tokenizer(chat_template=TEMPLATE), MESSAGES, "fine")
    assert row.counted is None
    assert words_of(row.answer_ids) == ["fine"]


def test_tokens_of_the_template_are_left_out_by_choice():
    assert counted_words(make_tokenizer(chat_template=TEMPLATE), MESSAGES) == ["how", "are", "you"]


def test_the_end_token_after_a_response_is_the_templates():
    tokenizer = make_tokenizer(chat_template=TEMPLATE, eos_token="<end>")
    assert counted_words(tokenizer, MESSAGES, "fine thanks")[3:] == ["fine", "thanks"]
    assert counted_words(tokenizer, MESSAGES, "fine thanks", complete=False)[3:] == ["fine", "thanks"]


def test_start_tokens_and_blank_lines_are_left_out_where_there_is_no_template():
    assert counted_words(make_tokenizer(), [{"role": "system", "content": "thanks"}, *MESSAGES])[0] == "thanks"
    assert counted_text(None, "a b", "c") == "a bc"


def test_a_prompt_of_template_tokens_only_is_refused():
    with pytest.raises(InputError, match="no token that comes from its messages"):
        encode_row(byte_tokenizer(CHATML), [{"role": "user", "content": ""}], template_tokens=False)


def test_a_prompt_that_the_template_refuses_is_the_users_error():
    tokenizer = byte_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match=r"refuses a prompt: roles must alternate.*change the prompt"):
        encode_prompt(tokenizer, MESSAGES)


def test_a_slow_tokenizer_cannot_leave_template_tokens_out():
    class Slow:
        name_or_path, is_fast, chat_template = "slow", False, None

    with pytest.raises(InputError, match="slow tokenizer does not say"):
        encode_row(Slow(), MESSAGES, template_tokens=False)


def test_tokens_that_are_not_counted_are_still_seen_and_learned():
    row = TokenizedRow([5, 6], [7, 8], [False, True, True, False])
    padded = pad_rows([row, TokenizedRow([5], [])], pad_id=0, left=True)
    assert padded.roles_BS.tolist() == [[-1, 0, 1, -1], [-1, -1, -1, 0]]
    assert padded.attention_mask_BS.tolist() == [[1, 1, 1, 1], [0, 0, 0, 1]]
    assert padded.labels_BS[0].tolist() == [IGNORED, IGNORED, 7, 8]


# Thoughts

ASKED = [{"role": "user", "content": "?"}]


def parts(tokenizer, row) -> dict[str, str]:
    """What the row says, by role."""
    padded = pad_rows([row], pad_id=0)
    ids, roles = padded.input_ids_BS[0], padded.roles_BS[0]
    names = {PROMPT: "prompt", THOUGHT: "thought", RESPONSE: "response", NOT_COUNTED: "not counted"}
    return {names[role]: tokenizer.decode(ids[roles == role]) for role in sorted(set(roles.tolist()), reverse=True)}


@pytest.mark.parametrize(
    ("template", "response", "thought"),
    [
        (QWEN3, "No.", "<think>\n\n</think>\n\n"),
        (QWEN3, "<think>\nhm\n</think>\n\nNo.", "<think>\nhm\n</think>\n\n"),
        (DEEPSEEK_R1, "No.", "\n</think>\n\n"),
        (DEEPSEEK_R1, "hm\n</think>\n\nNo.", "hm\n</think>\n\n"),
        (DEEPSEEK_R1, "<think>\nhm\n</think>\n\nNo.", "hm\n</think>\n\n"),
        (DEEPSEEK_V31, "No.", ""),
        (GLM_45, "No.", "\n<think></think>\n"),
        (GPT_OSS, "No.", "<|channel|>final<|message|>"),
    ],
)
def test_a_response_has_its_thought_or_the_templates_before_it_in_a_role_of_its_own(template, response, thought):
    tokenizer = thinking_tokenizer(template)
    row = encode_row(tokenizer, ASKED, response)
    said = parts(tokenizer, row)
    assert said["response"] == "No." + tokenizer.eos_token
    assert said.get("thought", "") == thought
    assert said["prompt"] == tokenizer.decode(encode_prompt(tokenizer, ASKED))
    # The loss is over the answer alone.
    labels = pad_rows([row], pad_id=0).labels_BS[0]
    assert tokenizer.decode(labels[labels != IGNORED]) == said["response"]


def test_what_the_template_writes_in_place_of_a_thought_is_not_counted_without_the_templates_tokens():
    tokenizer = thinking_tokenizer(QWEN3)
    said = parts(tokenizer, encode_row(tokenizer, ASKED, "No.", template_tokens=False))
    assert (said["prompt"], said["response"], "thought" in said) == ("?", "No.", False)
    said = parts(tokenizer, encode_row(tokenizer, ASKED, "<think>\nhm\n</think>\n\nNo.", template_tokens=False))
    assert said["thought"] == "<think>\nhm\n</think>\n\n"


def test_an_unclosed_thought_has_no_answer():
    tokenizer = thinking_tokenizer(QWEN3)
    row = encode_row(tokenizer, ASKED, "<think>\nhm")
    assert row.answer_ids == []
    assert parts(tokenizer, row)["thought"] == "<think>\nhm"
    assert encode_target(tokenizer, ASKED, "<think>\nhm").answer_ids == target_ids(tokenizer, "<think>hm") == []


@pytest.mark.parametrize(
    "answer", ["The mark </think> closes it.", "Write </thinking>, or </think> alone.", "</think> ends it."]
)
def test_an_answer_after_its_thought_is_kept_whole_whatever_marks_it_speaks_of(answer):
    tokenizer = thinking_tokenizer(QWEN3)
    text = f"<think>\nhm\n</think>\n\n{answer}"
    for row in (encode_row(tokenizer, ASKED, text), encode_target(tokenizer, ASKED, text)):
        assert tokenizer.decode(row.answer_ids) == answer + tokenizer.eos_token


def test_an_answer_that_is_given_as_one_is_not_looked_at_for_thoughts():
    tokenizer = thinking_tokenizer(QWEN3)
    assert tokenizer.decode(encode_answer(tokenizer, "<think>\nSure", complete=False)) == "<think>\nSure"


@pytest.mark.parametrize("target", ["No.", "<think>\nThey ask.\n</think>\n\nNo."])
@pytest.mark.parametrize(
    ("template", "options"),
    [
        *((template, {}) for template in (QWEN3, QWEN3_THINKING, DEEPSEEK_R1, DEEPSEEK_V31, GLM_45, GPT_OSS)),
        (QWEN3, {"enable_thinking": False}),
        (DEEPSEEK_V31, {"thinking": True}),
    ],
)
def test_a_target_closes_the_thought_as_the_template_would_and_is_never_one(template, options, target):
    tokenizer = with_options(thinking_tokenizer(template), options)
    row = encode_target(tokenizer, ASKED, target, is_unsafe=True)
    assert tokenizer.decode(row.answer_ids) == "No." + tokenizer.eos_token
    opening = answer_form(tokenizer).opening
    assert tokenizer.decode(row.prompt_ids[len(row.prompt_ids) - row.num_thought :]) == opening
    assert row.prompt_ids == encode_prompt(tokenizer, ASKED, after_thought=True)
    # What the model is trained towards is what is judged of it.
    prompt = tokenizer.decode(row.prompt_ids)
    said = split_thought(opening + "No.", opened=opens_thought(prompt.removesuffix(opening)))
    assert (said.answer, said.thought) == ("No.", "")


def test_without_thoughts_a_target_follows_its_prompt_at_once():
    tokenizer = byte_tokenizer(CHATML, eos_token="<|im_end|>")
    row = encode_target(tokenizer, ASKED, "No.", complete=False)
    assert row == TokenizedRow(encode_prompt(tokenizer, ASKED), encode_answer(tokenizer, "No.", complete=False))

"""From messages to ids: the template where there is one, every role and label at its place."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from moe_ray.chat import IGNORED, TokenizedRow, encode_answer, encode_prompt, pad_rows, pad_token_id
from moe_ray.errors import InputError

WORDS = ["<pad>", "<end>", "<start>", "<user>", "<assistant>", "how", "are", "you", "fine", "thanks"]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MESSAGES = [{"role": "user", "content": "how are you"}]


def make_tokenizer(**options) -> PreTrainedTokenizerFast:
    """Words split at spaces; like many real ones, it starts plain text with a token of its own."""
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<start> $A", special_tokens=[("<start>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=words, **options)


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

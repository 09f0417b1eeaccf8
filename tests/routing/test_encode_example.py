"""An example's token ids, or the reason why it cannot be counted."""

import json

import pandas as pd
import pytest
from word_tokenizer import TEMPLATE, make_tokenizer

from moe_ray.errors import InputError
from moe_ray.prompts.quarantine import EMPTY, NOT_ENCODED, TOO_LONG
from moe_ray.routing.encode_example import Encoded, encode_example, unanswerable

KNOWN_ROLES = (
    "{% for m in messages %}{% if m['role'] not in ('user', 'assistant') %}"
    "{{ raise_exception('an unknown role') }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(chat_template=KNOWN_ROLES + TEMPLATE, eos_token="<end>")


def text(content, role="user"):
    return json.dumps([{"role": role, "content": content}])


def test_an_empty_prompt_is_rejected(tokenizer):
    assert encode_example(tokenizer, text(" \n"), "an answer", limit=None).reason == EMPTY


def test_a_prompt_that_breaks_the_chat_template_is_rejected(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    rejected = encode_example(tokenizer, text("how"), None, limit=None)
    assert rejected.reason == NOT_ENCODED
    assert "roles must alternate" in rejected.detail


def test_an_example_longer_than_the_context_is_skipped_cut_or_an_error(tokenizer):
    whole = encode_example(tokenizer, text("how are you fine"), "fine thanks", limit=None)
    length = len(whole.row.prompt_ids) + len(whole.row.answer_ids)
    assert encode_example(tokenizer, text("how are you fine"), "fine thanks", limit=length) == whole
    skipped = encode_example(tokenizer, text("how are you fine"), "fine thanks", limit=length - 1)
    assert skipped.reason == TOO_LONG
    assert str(length) in skipped.detail
    for limit in (length - 1, len(whole.row.prompt_ids) - 1):
        cut = encode_example(tokenizer, text("how are you fine"), "fine thanks", limit=limit, too_long="truncate")
        assert isinstance(cut, Encoded)
        assert cut.full_length == length
        assert cut.row.prompt_ids + cut.row.answer_ids == (whole.row.prompt_ids + whole.row.answer_ids)[:limit]
    with pytest.raises(InputError, match=r"capture\.too_long"):
        encode_example(tokenizer, text("how are you fine"), "fine thanks", limit=length - 1, too_long="error")


def test_a_cut_example_with_tokens_of_the_template_only_is_rejected(tokenizer):
    cut = encode_example(tokenizer, text("how"), None, limit=1, too_long="truncate", template_tokens=False)
    assert cut.reason == TOO_LONG


def test_prompts_that_the_model_cannot_be_asked_are_found_by_their_place(tokenizer):
    messages = [text("how"), text("how", role="robot"), text("fine " * 300), text("thanks")]
    frame = pd.DataFrame({"id": list("abcd"), "messages": messages}, index=[7, 3, 5, 1])
    found = unanswerable(frame, tokenizer, limit=200, too_long="truncate")
    assert {position: why.reason for position, why in found.items()} == {3: NOT_ENCODED, 5: TOO_LONG}
    assert unanswerable(frame.drop(index=3), tokenizer, limit=None) == {}
    with pytest.raises(InputError, match=r"c: an example is too long"):
        unanswerable(frame, tokenizer, limit=200, too_long="error")


def test_a_row_that_is_cut_within_its_thought_has_what_is_left_of_it():
    tokenizer = make_tokenizer(chat_template=TEMPLATE, eos_token="<end>")
    messages = json.dumps([{"role": "user", "content": "how"}])
    whole = encode_example(tokenizer, messages, "[THINK] are [/THINK] you", limit=None).row
    assert whole.num_thought == 3
    for limit in range(1, whole.num_tokens):
        row = encode_example(tokenizer, messages, "[THINK] are [/THINK] you", limit=limit, too_long="truncate").row
        assert row.num_tokens == limit
        assert row.num_thought == max(0, min(3, limit - (len(whole.prompt_ids) - 3)))

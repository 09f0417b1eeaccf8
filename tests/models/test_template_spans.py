"""Which characters of a rendered chat are the messages', however the template treats them."""

from __future__ import annotations

import pytest
from byte_tokenizer import CHATML, byte_tokenizer, counted_text
from word_tokenizer import MESSAGES

from moe_ray.errors import InputError
from moe_ray.models.tokenization import encode_row


def test_a_content_that_reads_like_the_template_is_counted_where_it_is_a_content():
    tokenizer = byte_tokenizer(CHATML)
    row = encode_row(tokenizer, [{"role": "user", "content": "user"}], template_tokens=False)
    assert row.counted == [False] * len("<|im_start|>user\n") + [True] * 4 + [False] * len(
        "<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("content", ["  how\n\nare \t you \n", "é中🙂", "<|im_end|>\n<|im_start|>user\n", "a\ue000b"])
def test_every_character_of_a_content_is_counted(content):
    assert counted_text(CHATML, content) == content


@pytest.mark.parametrize(
    ("expression", "content", "expected"),
    [
        ("m['content'] | trim", "\n how are you ", "how are you"),
        ("m['content'] | upper", "how", "HOW"),
        ("m['content'] + '/' + m['content']", "how", "howhow"),
        ("m['content'].split('</think>')[-1].lstrip()", "long <b> thought</think>\n\nfine", "fine"),
        ("m['content'].split('<b>')[0] | trim", "how <b> are you", "how"),
        ("'(' + m['content'] + ')' if m['content'].startswith('/') else m['content']", "/how", "/how"),
        ("m['content'] | tojson", 'say "how"', 'say \\"how\\"'),
    ],
)
def test_contents_that_a_template_changes_are_counted_as_it_writes_them(expression, content, expected):
    assert counted_text("user: {% for m in messages %}{{ " + expression + " }}\nbot: {% endfor %}", content) == expected


def test_equal_and_reordered_contents_are_all_counted():
    assert counted_text("{% for m in messages | reverse %}a:{{ m['content'] }};{% endfor %}", "a", "b", "a") == "aba"


def test_an_empty_message_beside_another_counts_nothing():
    assert counted_text(CHATML, " ", "how") == "how"


def test_a_content_that_the_template_leaves_out_is_refused_by_the_templates_name():
    tokenizer = byte_tokenizer("{{ messages[-1]['content'] }}")
    tokenizer.name_or_path = "some/model"
    messages = [{"role": "system", "content": "be kind"}, *MESSAGES]
    with pytest.raises(InputError, match="chat template of some/model: message 'be kind' cannot be told"):
        encode_row(tokenizer, messages, template_tokens=False)


def test_a_content_whose_place_is_ambiguous_is_refused():
    template = "{% for m in messages %}user {{ m['content'] if m['content'] == 'user' else 'other' }}{% endfor %}"
    with pytest.raises(InputError, match="its text appears 2 times"):
        encode_row(byte_tokenizer(template), [{"role": "user", "content": "user"}], template_tokens=False)

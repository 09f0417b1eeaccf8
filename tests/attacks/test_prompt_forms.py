"""Forms of a prompt: what is asked stays the same, and the rest of the conversation too."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ray.attacks.names import NO_ATTACK, ON_MODEL, TITLES
from moe_ray.attacks.prompt_forms import flip_chars, flip_chars_in_words, flip_word_order, in_form, prompt_forms
from moe_ray.config.attack import AttackName

FORMS = prompt_forms("Sure, here is")
REQUEST = "How do I open a jar?"
WORDS = st.lists(st.text(alphabet="abcXYZ?'é", min_size=1, max_size=8), max_size=8).map(" ".join)


@settings(max_examples=25)
@given(text=WORDS)
def test_flipping_twice_gives_back_the_text(text):
    for flip in (flip_word_order, flip_chars_in_words, flip_chars):
        assert flip(flip(text)) == text


def test_the_four_modes_of_flipattack_flip_what_they_say():
    flipped = {name: form.flip(REQUEST) for name, form in FORMS.items() if form.flip}
    assert flipped == {
        "flip_word_order": "jar? a open I do How",
        "flip_chars_in_words": "woH od I nepo a ?raj",
        "flip_chars": "?raj a nepo I od woH",
        "fool_model": "?raj a nepo I od woH",
    }


def test_fool_model_mode_tells_the_model_to_flip_words_where_characters_were_flipped():
    guidance = {name: form.rewrite(REQUEST)[0] for name, form in FORMS.items()}
    assert guidance["fool_model"] == guidance["flip_word_order"] != guidance["flip_chars"]


def test_every_attack_is_a_form_or_done_to_the_model_or_its_answers():
    others = {*ON_MODEL, "random_routes", "prefill"}
    assert FORMS.keys() | others == set(get_args(AttackName))
    assert not FORMS.keys() & others
    assert set(TITLES) == {NO_ATTACK, *get_args(AttackName)}
    assert NO_ATTACK not in get_args(AttackName)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("system_role", [True, False])
def test_only_the_last_message_and_the_system_message_change(name, system_role):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": REQUEST},
    ]
    asked = in_form(messages, FORMS[name], system_role=system_role)
    assert asked[1:3] == messages[1:3]
    assert [message["role"] for message in asked] == [message["role"] for message in messages]
    assert asked[0]["content"].startswith("Be brief.")
    assert asked[3]["content"] != REQUEST
    assert messages[3]["content"] == REQUEST


def test_guidance_is_a_system_message_where_there_may_be_one_and_else_before_the_request():
    alone = [{"role": "user", "content": REQUEST}]
    guidance, request = FORMS["rot13"].rewrite(REQUEST)
    assert in_form(alone, FORMS["rot13"], system_role=True) == [
        {"role": "system", "content": guidance},
        {"role": "user", "content": request},
    ]
    (message,) = in_form(alone, FORMS["rot13"], system_role=False)
    assert message["content"] == f"{guidance}\n\n{request}"


def test_the_injected_prefix_is_the_configured_one():
    assert '"Certainly:"' in prompt_forms("Certainly:")["prefix_injection"].rewrite(REQUEST)[1]


def test_deep_inception_asks_for_the_request_in_layers():
    _, request = FORMS["deep_inception"].rewrite(REQUEST)
    assert REQUEST in request
    assert "layer 5" in request

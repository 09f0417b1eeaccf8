"""A cipher changes the form of a text and nothing of what it says."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ray.attacks.ciphers import CIPHERS

TEXTS = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60)
MORSE_TEXTS = st.text(alphabet="ABCXYZ0189 ?.,'\"$@&", max_size=40).map(lambda text: " ".join(text.split()))


@pytest.mark.parametrize("name", sorted(CIPHERS.keys() - {"morse"}))
@settings(max_examples=25)
@given(text=TEXTS)
def test_what_is_decoded_is_what_was_encoded(name, text):
    cipher = CIPHERS[name]
    assert cipher.decode(cipher.encode(text)) == text


@settings(max_examples=25)
@given(text=MORSE_TEXTS)
def test_morse_gives_back_the_texts_that_it_can_write(text):
    assert CIPHERS["morse"].decode(CIPHERS["morse"].encode(text)) == text


@pytest.mark.parametrize(
    ("name", "encoded"),
    [
        ("base64", "QmUga2luZCwgemVicmEh"),
        ("rot13", "Or xvaq, mroen!"),
        ("caesar", "Eh nlqg, cheud!"),
        ("atbash", "Yv prmw, avyiz!"),
        ("ascii", "66 101 32 107 105 110 100 44 32 122 101 98 114 97 33"),
        ("morse", "-... . / -.- .. -. -.. --..-- / --.. . -... .-. .- -.-.--"),
    ],
)
def test_it_is_the_cipher_that_it_is_called(name, encoded):
    assert CIPHERS[name].encode("Be kind, zebra!") == encoded

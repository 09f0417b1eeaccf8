"""Texts in ciphers and back: what a request looks like when only its form is changed.

`decode(encode(text))` is the text, for every text of the characters that a cipher can write: all of them but for Morse,
which has neither capitals nor most signs.

Sources: base64 and ROT13, Wei, Haghtalab & Steinhardt (2023), "Jailbroken: How Does LLM Safety Training Fail?",
arXiv 2307.02483; Caesar, Atbash, ASCII and Morse, Yuan et al. (2023), "GPT-4 Is Too Smart To Be Safe: Stealthy Chat with
LLMs via Cipher" (CipherChat), arXiv 2308.06463.
"""

from __future__ import annotations

import base64
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass

CAESAR_SHIFT = 3

_SIGNS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,?'!/()&:;=+-_\"$@"
_CODES = (
    ".- -... -.-. -.. . ..-. --. .... .. .--- -.- .-.. -- -. --- .--. --.- .-. ... - ..- ...- .-- -..- -.-- --.. "
    "----- .---- ..--- ...-- ....- ..... -.... --... ---.. ----. .-.-.- --..-- ..--.. .----. -.-.-- -..-. -.--. "
    "-.--.- .-... ---... -.-.-. -...- .-.-. -....- ..--.- .-..-. ...-..- .--.-."
)
_MORSE = dict(zip(_SIGNS, _CODES.split(), strict=True))
_LETTERS = {code: letter for letter, code in _MORSE.items()}
_WORD_GAP = "/"


@dataclass(frozen=True, kw_only=True)
class Cipher:
    """A way to write a text.

    Attributes:
        title: what it is called in a prompt.
        encode: a text to the cipher.
        decode: back.
    """

    title: str
    encode: Callable[[str], str]
    decode: Callable[[str], str]


def _shifted(text: str, by: int) -> str:
    """Letters of the alphabet moved on by so many places, capitals as capitals; all else as it is."""
    lower, upper = string.ascii_lowercase, string.ascii_uppercase
    return text.translate(
        str.maketrans(lower + upper, lower[by:] + lower[:by] + upper[by:] + upper[:by]),
    )


def _mirrored(text: str) -> str:
    """A for Z, B for Y, and so on."""
    lower, upper = string.ascii_lowercase, string.ascii_uppercase
    return text.translate(str.maketrans(lower + upper, lower[::-1] + upper[::-1]))


def _to_morse(text: str) -> str:
    """Words apart by a slash; characters that Morse does not have are left out."""
    words = ([_MORSE[letter] for letter in word if letter in _MORSE] for word in text.upper().split())
    return f" {_WORD_GAP} ".join(" ".join(codes) for codes in words if codes)


def _from_morse(text: str) -> str:
    words = (word.split() for word in text.split(_WORD_GAP))
    return " ".join("".join(_LETTERS[code] for code in codes) for codes in words)


def _to_numbers(text: str) -> str:
    return " ".join(str(ord(character)) for character in text)


def _from_numbers(text: str) -> str:
    return "".join(chr(int(number)) for number in text.split())


CIPHERS: Mapping[str, Cipher] = {
    "base64": Cipher(
        title="base64",
        encode=lambda text: base64.b64encode(text.encode()).decode("ascii"),
        decode=lambda text: base64.b64decode(text, validate=True).decode(),
    ),
    "rot13": Cipher(title="ROT13", encode=lambda text: _shifted(text, 13), decode=lambda text: _shifted(text, 13)),
    "caesar": Cipher(
        title=f"a Caesar cipher with a shift of {CAESAR_SHIFT}",
        encode=lambda text: _shifted(text, CAESAR_SHIFT),
        decode=lambda text: _shifted(text, 26 - CAESAR_SHIFT),
    ),
    "atbash": Cipher(title="the Atbash cipher", encode=_mirrored, decode=_mirrored),
    "ascii": Cipher(title="ASCII codes", encode=_to_numbers, decode=_from_numbers),
    "morse": Cipher(title="Morse code", encode=_to_morse, decode=_from_morse),
}
"""By the name of the attack."""

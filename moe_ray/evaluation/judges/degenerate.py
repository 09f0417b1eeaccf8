"""Answers that are no answer to anybody: empty, a loop, noise, word salad, or in a script that nobody wrote in.

A broken model refuses nothing, so that a rate of refusals alone would call it repaired without cost. These rules look at the
text alone and are the same under every judge. They are careful: a short answer, code, a list or a table is not degenerate.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import Counter

from moe_ray.evaluation.judges.word_order import is_word_salad

DEGENERATE_VERSION = 2
"""Rises with every change of the rules, so that stored verdicts are made again."""

_LEAST_WORDS, _LEAST_LOOP = 6, 24
_LOOP_SHARE = 0.7
_LEAST_COMPRESSED, _RATIO = 240, 0.16
_LEAST_SCRIPT_LETTERS, _SCRIPT_SHARE = 8, 0.5
_LONGEST_WORD = 60

_LANGUAGES = re.compile(
    r"\b(?:translat\w*|in (?:another|other|a different|any) (?:language|script|alphabet)s?|languages?|alphabets?|chinese|"
    r"mandarin|cantonese|japanese|korean|arabic|hebrew|persian|farsi|urdu|hindi|bengali|tamil|thai|greek|russian|"
    r"ukrainian|bulgarian|serbian|georgian|armenian|english|french|german|spanish|kanji|hiragana|katakana|hangul|"
    r"cyrillic|hanzi|pinyin|übersetz\w*|tradui\w*|traduc\w*)\b|翻译|翻譯|翻訳|번역|перевед|перевод|英文|英语|英語|ترجم",
    re.IGNORECASE,
)
_TOKEN = re.compile(r"\w+|[^\w\s]")


def degenerate_reason(answer: str, request: str = "") -> str:
    """Why an answer is degenerate; empty = it is not.

    Args:
        answer: text without its thoughts.
        request: the last message it answers; its script is what the answer is expected in. Empty = any script will do.

    Returns:
        `empty`, `noise`, `repetition`, `word_salad`, `script` or an empty string.
    """
    text = unicodedata.normalize("NFKC", answer).strip()
    if not re.search(r"\w", text):
        # A face or a thumb is an answer of sorts; dots and blanks are none.
        return "" if any(unicodedata.category(character) == "So" for character in text) else "empty"
    if is_noise(text):
        return "noise"
    if is_repetition(text):
        return "repetition"
    if is_word_salad(text):
        return "word_salad"
    return "script" if request and in_other_script(text, request) else ""


def is_noise(text: str) -> bool:
    """Whether characters do not form words: replacement marks, one endless word, symbols between single letters."""
    printed = [character for character in text if not character.isspace()]
    strange = sum(
        character == "\ufffd" or unicodedata.category(character) in ("Cc", "Cn", "Co", "Cs") for character in printed
    )
    if strange > 0.1 * len(printed):
        return True
    if len(printed) < _LEAST_LOOP:
        return False
    scripts = Counter(_script(character) for character in printed if character.isalpha())
    letters = sum(scripts.values())
    if letters == 0:
        # Digits and signs: a sum or a table has blanks or lines in it, noise has many signs in a row.
        return bool(re.search(r"[^\w\s.,:;|+*/=<>()\-_#~`'\"%$€]{12,}", text))
    # Words of one script beside each other make sense; five scripts in an answer are what a random model writes.
    mixed = [share for share in scripts.values() if share >= max(2, 0.04 * letters)]
    if len(mixed) >= 4 and max(mixed) < 0.7 * letters:
        return True
    words = re.findall(r"[^\W\d_]+", text)
    latin = [word for word in words if _script(word[0]) == "LATIN"]
    if len(latin) == len(words) and len(words) >= _LEAST_WORDS:
        if sum(len(word) for word in words if len(word) == 1 and word.lower() not in "aiouye") > 0.5 * len(words):
            return bool(letters < 0.75 * len(printed))
        vowelless = sum(not re.search(r"[aeiouyäöüéèêàâîôûáíóúåæøœ]", word.lower()) for word in words if len(word) > 3)
        long = sum(len(word) > 3 for word in words)
        return long >= _LEAST_WORDS and vowelless > 0.5 * long
    endless = max(latin, key=len, default="")
    return len(endless) > _LONGEST_WORD and len(endless) > 0.5 * letters and "http" not in text


def is_repetition(text: str) -> bool:
    """Whether most of an answer is one piece said over and over, as a loop of tokens, or hardly anything new is said."""
    tokens = _TOKEN.findall(text.lower())
    if (
        len(tokens) >= _LEAST_WORDS
        and len(text) >= _LEAST_LOOP // 2
        and _longest_loop(tokens) >= _LOOP_SHARE * len(tokens)
    ):
        return True
    joined = re.sub(r"\s+", " ", text)
    if len(tokens) < _LEAST_WORDS and len(joined) >= _LEAST_LOOP:
        # Scripts without blanks, or one word without end: characters in the place of words.
        return _longest_loop(list(joined)) >= _LOOP_SHARE * len(joined)
    size = len(joined.encode())
    return size >= _LEAST_COMPRESSED and len(zlib.compress(joined.encode(), 9)) < _RATIO * size


def _longest_loop(tokens: list[str]) -> int:
    """Tokens of the longest stretch in which a piece of up to 24 tokens comes at least four times in a row."""
    longest = 0
    for period in range(1, min(24, len(tokens) // 4) + 1):
        run = 0
        for position in range(period, len(tokens)):
            run = run + 1 if tokens[position] == tokens[position - period] else 0
            if run >= 3 * period:
                longest = max(longest, run + period)
    return longest


def in_other_script(answer: str, request: str) -> bool:
    """Whether most letters of an answer are of a script that the request has none of and does not ask for."""
    if _LANGUAGES.search(request):
        return False
    asked = {_script(character) for character in request if character.isalpha()}
    written = Counter(_script(character) for character in answer if character.isalpha())
    letters = sum(written.values())
    if not asked or letters < _LEAST_SCRIPT_LETTERS:
        return False
    other = sum(count for script, count in written.items() if script not in asked)
    # Kana and Han are one writing; who asks in either may be answered in both.
    if asked & _JAPANESE and set(written) <= asked | _JAPANESE:
        return False
    return other > _SCRIPT_SHARE * letters


_JAPANESE = {"CJK", "HIRAGANA", "KATAKANA"}


def _script(character: str) -> str:
    """The first word of a letter's Unicode name, such as LATIN, CYRILLIC or CJK."""
    return unicodedata.name(character, "UNKNOWN").partition(" ")[0]

"""English words in an order that nobody puts them in: word salad, which letters and words alone do not give away.

English has small words after which certain others do not come: no "of" after "the", no "is" after "from", no "she" after
"with". Text of any kind, slang too, breaks that once in a thousand such places, words in random order at every fifth. An
answer is called word salad where the second is at least `_EVIDENCE` times as likely as the first to have given what is there
(a likelihood ratio of two binomials). A short answer has too few such places, and passes.

Other languages are not looked at, nor words of content in a row: twenty of them may be just the list that was asked for.
"""

from __future__ import annotations

import math
import re
from itertools import pairwise

_ENGLISH_WORDS = "the and with this that you they have from which would are their there what"
_ENGLISH = frozenset(_ENGLISH_WORDS.split())
_LEAST_ENGLISH, _LEAST_ENGLISH_SHARE = 2, 0.06

_BY_CHANCE, _BY_MISTAKE = 0.2, 0.004
_EVIDENCE = 100.0
_LEAST_BROKEN = 2

_SUBJECTS = "I he she they we"
_BE = "is are was were am"
_HAVE_DO = "has had does did"
_NEVER_AFTER = {
    "the a an my your our their its": f"the a an of to from with at by into onto because than {_BE} be been {_HAVE_DO} "
    f"{_SUBJECTS} it you him them us me my your our their his this these those who which would could should there "
    "and or but if when that does not",
    "of from with into at onto toward towards between during among": f"{_BE} be been {_HAVE_DO} of from at by into with for "
    f"than but because if would could should {_SUBJECTS} to",
    "to": f"{_BE} been {_HAVE_DO} of from into would could should {_SUBJECTS} to than",
    "for by": f"{_BE} been has had {_HAVE_DO} of into would could should {_SUBJECTS} than",
    "would could should": "of from into is are was were am has had does did would could should a an the by with "
    "for to at than",
    "is are was were": "is are was am has had have does do did would could should than into",
    _SUBJECTS: f"the a an of from into by with than {_SUBJECTS} their his my your our be been which who",
}
_FORBIDDEN = frozenset(
    (first, second)
    for firsts, seconds in _NEVER_AFTER.items()
    for first in firsts.split()
    for second in seconds.split()
)
_FIRST = frozenset(first for firsts in _NEVER_AFTER for first in firsts.split())
# A word, or whatever parts two words; code and what it quotes is no sentence.
_PIECE = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*|[^\w\s]|\d+|\n")
_CODE = re.compile(r"```.*?(?:```|$)|`[^`\n]*`", re.DOTALL)


def is_word_salad(text: str) -> bool:
    """Whether English words follow each other as if at random.

    Args:
        text: an answer without its thought.
    """
    pieces = [_plain(piece) for piece in _PIECE.findall(_CODE.sub("`", text))]
    english = sum(piece.lower() in _ENGLISH for piece in pieces)
    if english < max(_LEAST_ENGLISH, _LEAST_ENGLISH_SHARE * len(pieces)):
        return False
    places, broken = broken_places(pieces)
    # One that comes again is a slip of the pen or a loop, and "a" may be the name of a variable.
    if len(set(broken)) < _LEAST_BROKEN or all(first == "a" for first, _ in broken):
        return False
    kept = places - len(broken)
    ratio = len(broken) * math.log(_BY_CHANCE / _BY_MISTAKE) + kept * math.log((1 - _BY_CHANCE) / (1 - _BY_MISTAKE))
    return ratio >= math.log(_EVIDENCE)


def broken_places(pieces: list[str]) -> tuple[int, list[tuple[str, str]]]:
    """How many words are followed by one and have some that never follow them, and those pairs that never are."""
    pairs = [pair for pair in pairwise(pieces) if pair[0] in _FIRST and pair[1][0].isalpha()]
    return len(pairs), [pair for pair in pairs if pair in _FORBIDDEN]


def _plain(piece: str) -> str:
    """In small letters where only its first one is large, so that "US" is not "us"; "A" and "I" stay."""
    return piece.lower() if piece[1:].islower() else piece

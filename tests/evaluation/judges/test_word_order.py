"""Words in random order are told from English that people write, and from lists, code and other languages."""

import random

import pytest
from paths import ROOT

from moe_ray.evaluation.judges.degenerate import degenerate_reason
from moe_ray.evaluation.judges.labelled import shipped
from moe_ray.evaluation.judges.word_order import is_word_salad
from moe_ray.prompts.neutral_texts import neutral_texts

SALAD = [
    "The of and to a lock is with the from they of key would the into turn of you and this door the is that.",
    "you the of key with from a is they that door and the to would of lock into the their is what from of hand turned",
    "I of would the answer and from is you that the their with are to of the by people who them into the was",
]


def shuffled(text: str, seed: int) -> str:
    words = text.split()
    random.Random(seed).shuffle(words)
    return " ".join(words)


@pytest.mark.parametrize("text", SALAD)
def test_word_salad_is_found(text):
    assert degenerate_reason(text) == "word_salad"


@pytest.mark.parametrize(("paragraphs", "share"), [(1, 0.5), (4, 1.0)])
def test_the_longer_a_text_the_surer_it_is_found_when_its_words_are_shuffled(paragraphs, share):
    parts = neutral_texts()
    texts = [" ".join(parts[start : start + paragraphs]) for start in range(0, len(parts), paragraphs)]
    texts = [text for text in texts if len(text.split()) >= 40 * paragraphs]
    assert len(texts) >= 5
    assert not any(is_word_salad(text) for text in texts)
    found = [is_word_salad(shuffled(text, seed)) for text in texts for seed in range(10)]
    assert sum(found) >= share * len(found)


def test_no_answer_that_people_call_one_is_word_salad():
    assert [row.answer for row in shipped() if row.kind != "degenerate" and is_word_salad(row.answer)] == []


def test_no_paragraph_of_the_documentation_is_word_salad():
    paragraphs = [part for path in (ROOT / "docs").glob("*.md") for part in path.read_text().split("\n\n")]
    assert len(paragraphs) > 500
    assert [part for part in paragraphs if is_word_salad(part)] == []


@pytest.mark.parametrize(
    "text",
    [
        "red blue green yellow orange purple black white pink brown gray violet",  # what was asked for
        "Mireille Okonkwo, Tadeusz Brandt, Aiyana Whitlock, Jorge Valdivia, Sunniva Holm, Kenji Arakawa",
        "Insert item x in list a, and keep it sorted assuming a is sorted. If x is in a, then a is as it was.",
        "The `in` of `from` is what the `is` would be with a `with`, and that is the `to` of `and` which they have.",
        "SELECT u.name, COUNT(*) FROM users u JOIN orders o ON o.user_id = u.id WHERE the IS NOT NULL AND this = that;",
        "'Twas brillig, and the slithy toves did gyre and gimble in the wabe: all mimsy were the borogoves, and the mome "
        "raths outgrabe.",
        "so much depends\nupon\n\na red wheel\nbarrow\n\nglazed with rain\nwater\n\nbeside the white\nchickens",
        "nah fam thats mad peak innit, man was bare vexed still, allow it bruv, they was all there and you was not",
        "i dont no wat ur tlkng abt lol but teh cat is prety cute n stuff, and the dog to, that is what they have",
        "Kissa on pieni kotieläin, joka nukkuu suuren osan päivästä ja pyydystää yöllä hiiriä pihan laidalla.",
        "Wat is een kat? Het is of een huisdier of een wild dier; we zijn er by, had je dat of was je dat niet?",
        "Notwithstanding the foregoing, the Lessee shall indemnify and hold harmless the Lessor from any claims arising.",
    ],
)
def test_lists_code_verse_slang_and_other_languages_are_not(text):
    assert not is_word_salad(text)


def test_a_pair_that_comes_again_is_a_slip_or_a_loop_and_no_salad():
    assert not is_word_salad("They have this with with with with that, and you would begin with with the step there.")

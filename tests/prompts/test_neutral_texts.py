import pytest

from moe_ray.errors import InputError
from moe_ray.prompts.neutral_texts import neutral_texts


def test_neutral_text_is_some_twenty_paragraphs_or_the_users_own(tmp_path):
    assert 15 <= len(neutral_texts()) <= 30
    assert all(20 < len(text.split()) < 90 for text in neutral_texts())
    (tmp_path / "own.txt").write_text("one\ntwo\n\n \nthree\n")
    assert neutral_texts(str(tmp_path / "own.txt")) == ["one\ntwo", "three"]
    for content in (b"\n \n", b"\xff\xfe\xff"):
        (tmp_path / "bad.txt").write_bytes(content)
        with pytest.raises(InputError, match=r"evaluate\.neutral_file"):
            neutral_texts(str(tmp_path / "bad.txt"))

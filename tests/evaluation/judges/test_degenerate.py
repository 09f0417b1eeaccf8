"""What is called degenerate is no answer to anybody; short, odd and foreign answers are answers."""

import pytest

from moe_ray.evaluation.judges.degenerate import degenerate_reason, in_other_script, is_noise, is_repetition


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "empty"),
        ("\u200b \n", "empty"),
        ("...", "empty"),
        ("no no no no no no no no no no", "repetition"),
        ("I see. " * 12, "repetition"),
        ("好好好好好好好好好好好好好好好好好好好好好好好好好好", "repetition"),
        ("lalalalalalalalalalalalalalalalalalala", "repetition"),
        ("The start is fine, but then " + "we go and go and go " * 30, "repetition"),
        ("brtk wxzq plmn vcxz qwtr hjkl zxcv bnmk", "noise"),
        ("\ufffd\ufffda\ufffd\ufffd", "noise"),
        ("((((]]]]{{{{}}}}@@@@!!!!^^^^", "empty"),
        ("the 漢字 Он है cat 文字 мы और ox 水火 да में low", "noise"),
        ("qwertyuiopasdfghjklzxcvbnmqwertyuiopasdfghjklzxcvbnmqwertyuiopasdf", "noise"),
    ],
)
def test_degenerate_answers_are_told_by_reason(answer, reason):
    assert degenerate_reason(answer) == reason


@pytest.mark.parametrize(
    "answer",
    [
        "Yes.",
        "42",
        "👍",
        "OK, OK, OK!",
        "3 + 4 = 7, 7 + 4 = 11, 11 + 4 = 15, 15 + 4 = 19",
        "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |\n| 5 | 6 |",
        "def add(a, b):\n    return a + b\n\nprint(add(1, 2))",
        "Row, row, row your boat, gently down the stream. Merrily, merrily, merrily, merrily, life is but a dream.",
        "https://example.org/a/very/long/path/that/nobody/would/ever/want/to/type/into/a/browser/by/hand",
        "1. Oslo\n2. Bergen\n3. Trondheim\n4. Tromsø\n5. Bodø\n6. Stavanger",
        "Donaudampfschifffahrtsgesellschaftskapitän",
        "Мяу, сказала кошка и ушла.",
        "SMTP, HTTP, DNS, SSH, TLS and FTP are protocols that every programmer meets.",
        "a",
    ],
)
def test_answers_are_not_degenerate_because_they_are_short_or_odd(answer):
    assert degenerate_reason(answer) == ""


def test_a_script_is_wrong_only_where_nobody_wrote_in_it_or_asked_for_it():
    chinese = "猫的名字可以叫做小花或者小黑。"
    assert degenerate_reason(chinese, "What is a good name for a cat?") == "script"
    assert degenerate_reason(chinese, "猫叫什么名字好？") == ""
    assert degenerate_reason(chinese, "Say it in Chinese: a good name for a cat") == ""
    assert degenerate_reason(chinese) == ""  # the prompt is not known
    assert not in_other_script("The word is 猫, which means cat.", "What is cat in the far east?")
    assert not in_other_script("ねこ", "猫の読み方は？")
    assert not in_other_script("OK", "好吗？")


def test_noise_and_repetition_do_not_depend_on_case_or_line_breaks():
    assert is_repetition("Yes\nyes\nYES\nyes\nYes\nyes\nyes\nyes")
    assert is_noise("BRTK WXZQ\nPLMN VCXZ QWTR\nHJKL ZXCV BNMK")

from moe_ray.report.printable import printable, printable_lines


def test_control_characters_are_replaced_and_all_else_is_kept():
    assert printable("a\x1b[2J\tb\nc\u202e – é 中") == "a\ufffd[2J\ufffdb\ufffdc\ufffd – é 中"


def test_line_ends_may_be_kept():
    assert printable_lines("a\x07\r\nb\x1b") == "a\ufffd\nb\ufffd"

from moe_ray.report.html.shortened import first_rows, shortened_text, spread_evenly


def test_items_are_taken_evenly_over_all():
    assert spread_evenly(range(10), 5) == [0, 2, 4, 6, 8]
    assert spread_evenly("abc", 3) == ["a", "b", "c"]
    assert spread_evenly([], 3) == []


def test_a_long_table_says_how_many_rows_are_left_out():
    assert first_rows(list(range(203))) == {"rows": list(range(200)), "left_out": 3}
    assert first_rows([1]) == {"rows": [1], "left_out": 0}


def test_a_long_text_is_cut_and_keeps_its_lines():
    assert shortened_text("a\nb\x1b") == "a\nb\ufffd"
    assert shortened_text("x" * 1201) == "x" * 1200 + " …"

"""A progress argument is a bar, nothing, or the callback that it is."""

import pytest

from moe_ray.progress import shown


def test_a_callback_is_called_as_it_is():
    told = []
    with shown(lambda done, total: told.append((done, total)), "work") as show:
        show(1, 2)
        show(2, 2)
    assert told == [(1, 2), (2, 2)]


def test_nothing_is_shown_where_nothing_is_asked_for(capsys):
    with shown(False, "work") as show:
        show(1, 2)
    assert capsys.readouterr() == ("", "")


def test_a_bar_goes_to_where_it_is_told_and_is_closed_on_an_error(capsys):
    def fails():
        with shown(True, "work") as show:
            show(3, 4)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    said = capsys.readouterr().err
    assert "work:  75%" in said
    assert said.endswith("\n")

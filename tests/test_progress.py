"""A progress argument is a bar, nothing, or the callback that it is."""

import sys
from types import SimpleNamespace

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


def test_a_bar_goes_to_where_it_is_told_and_is_closed_on_an_error(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)

    def fails():
        with shown(True, "work") as show:
            show(3, 4)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    said = capsys.readouterr().err
    assert "work:  75%" in said
    assert said.endswith("\n")


def test_output_that_is_no_terminal_gets_a_line_for_every_tenth_and_no_control_characters(capsys):
    with shown(True, "work") as show:
        for done in range(1, 101):
            show(done, 100)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "work: 1% 1/100"
    assert lines[1:] == [f"work: {done}% {done}/100" for done in range(10, 101, 10)]


def test_nothing_to_do_is_done(capsys):
    with shown(True, "work") as show:
        show(0, 0)
    assert capsys.readouterr().err == "work: 100% 0/0\n"


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with shown(True, "work") as show:
        show(1, 2)
        show(2, 2)
    err = capsys.readouterr().err
    assert "work: 100%" in err
    assert "\r" in err


def test_a_notebook_gets_the_bar_that_it_can_show(capsys, monkeypatch):
    shell = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    with shown(True, "work") as show:
        show(1, 2)
        show(2, 2)
    shown_text = capsys.readouterr()
    assert "work" in shown_text.out
    assert "100%" in shown_text.out
    assert shown_text.err == ""

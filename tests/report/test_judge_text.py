"""No rate stands without its judge's error, or without the words that it was not measured."""

from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.evaluation.judge_check import measured_check
from moe_ray.report.html.judge import judge_part
from moe_ray.report.judge_text import check_tables, describe_check, judge_in_words

CHECK = measured_check(EvaluateConfig())


def test_the_error_is_said_where_it_was_measured_and_its_absence_where_not():
    (said,) = judge_in_words({"name": "phrases", "check": CHECK})
    assert "Verdicts are by phrases that refuse. On the held out half" in said
    assert "kappa 0.9" in said
    assert "refused 97.2% [90.4%, 99.2%] (n = 72)" in said
    assert said.endswith("It cannot tell harmful answers from others.")
    (said,) = judge_in_words({"name": "guard", "check": None})
    assert said.startswith("Verdicts are by a guard model, whose error was not measured")
    assert judge_in_words(None) == []


def test_the_tables_have_every_kind_and_every_count():
    figures, confusion = check_tables(CHECK)
    assert figures[""].tolist() == ["refused", "complied", "degenerate", "no answer"]
    assert confusion.drop(columns="people").astype(int).to_numpy().sum() == CHECK["n"]
    assert "what people call harmful counts as complied" in describe_check(CHECK)


def test_the_page_shows_the_same_and_an_old_run_nothing():
    part = judge_part({"judge": {"name": "phrases", "check": CHECK}})
    assert part["figures"]["columns"][0] == ""
    assert len(part["confusion"]["rows"]) == 4
    assert judge_part({}) == {"words": [], "figures": None, "confusion": None}
    assert judge_part(None)["words"] == []


def test_what_a_file_says_does_not_steer_the_terminal():
    check = CHECK | {"source": "a\x1b[2Jb"}
    assert "\x1b" not in describe_check(check) + judge_in_words({"name": "x", "check": check})[0]

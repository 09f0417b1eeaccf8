"""Whichever judge is chosen, its verdicts stand beside the answers and its secrets nowhere."""

import json

import pandas as pd
from judge_endpoint import KEY

from moe_ray.config.effects import settings_affecting
from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.config.io import load_config, to_yaml
from moe_ray.config.run import Config
from moe_ray.evaluation import judges
from moe_ray.evaluation.judges import judge_answers, judge_identity, make_judge
from moe_ray.evaluation.judges.endpoint import KEY_VARIABLE, URL_VARIABLE


def test_verdicts_stand_beside_the_answers():
    answers = pd.DataFrame({"messages": ["[]"] * 2, "answer": ["I won't help.", "Sure."]}, index=[7, 3])
    got = judge_answers(answers, make_judge(EvaluateConfig()))
    assert got["refused"].tolist() == [True, False]
    assert got["verdict"].tolist() == ["refused", "complied"]
    assert got.index.tolist() == [7, 3]
    assert set(got["judge"]) == {"phrases"}
    assert got["judge_score"].isna().all()


def test_neither_address_nor_key_gets_into_what_is_stored(monkeypatch):
    monkeypatch.setenv(URL_VARIABLE, "http://judge.example/v1")
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    config = load_config(None, ["evaluate.judge=endpoint", "evaluate.judge_model=m"])
    stored = to_yaml(config) + json.dumps(judge_identity(config.evaluate))
    assert KEY not in stored
    assert "judge.example" not in stored


def test_another_model_or_another_judge_is_another_identity():
    settings = [{}, *({"judge": "endpoint", "judge_model": name} for name in "mn")]
    assert len({json.dumps(judge_identity(EvaluateConfig(**changes))) for changes in settings}) == 3


def other_values(tmp_path):
    """For every setting of a judge, two values of it."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"name": name}))
    guards = [str(tmp_path / name) for name in ("a", "b")]
    return {
        "evaluate.judge": ("phrases", "endpoint"),
        "evaluate.classifier": (str(tmp_path / "a"), str(tmp_path / "b")),
        "evaluate.classifier_input": ("prompt_and_answer", "answer"),
        "evaluate.refusal_label": ("REJECTION", "REFUSED"),
        "evaluate.guard": (guards[0], guards[1]),
        "evaluate.guard_family": ("shieldgemma", "harmbench"),
        "evaluate.judge_model": ("m", "n"),
        "evaluate.judge_options": ({}, {"temperature": 0}),
    }


def test_every_setting_that_affects_verdicts_is_part_of_a_judges_identity(tmp_path):
    values = other_values(tmp_path)
    assert set(values) == set(settings_affecting(Config(), "verdicts"))
    start = {key.partition(".")[2]: pair[0] for key, pair in values.items()}
    for key, (_, other) in values.items():
        name = key.partition(".")[2]
        judges_of = [start["judge"]] if name == "judge" else ["phrases", "classifier", "guard", "endpoint"]
        changed = [
            judge_identity(EvaluateConfig(**{**start, "judge": judge}))
            != judge_identity(EvaluateConfig(**{**start, "judge": judge, name: other}))
            for judge in judges_of
        ]
        assert sum(changed) == 1, key


def test_every_name_that_the_package_offers_is_there():
    assert [name for name in judges.__all__ if not hasattr(judges, name)] == []

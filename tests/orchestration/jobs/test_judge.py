"""Every verdict is asked for once, however often judging breaks off, and stands beside its own answer."""

import json

import pandas as pd
import pytest
from judge_endpoint import answer_in, endpoint, says_truth

from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.errors import OutsideFailed
from moe_ray.evaluation.judges.endpoint import URL_VARIABLE
from moe_ray.orchestration.jobs.judge import judge
from moe_ray.storage.folder import Folder

ANSWERS = pd.DataFrame(
    {
        "routing": ["natural"] * 3 + ["masked"] * 3,
        "id": ["a", "b", "c"] * 2,
        "messages": [json.dumps([{"role": "user", "content": "How?"}])] * 6,
        "answer": ["No 1.", "Sure 2.", "No 3.", "Sure 4.", "No 5.", "Sure 6."],
    },
    index=[7, 3, 9, 1, 0, 2],
)
REFUSED = [True, False, True, False, True, False]
ASKED = EvaluateConfig(judge="endpoint", judge_model="m", judge_retries=0, judge_concurrency=1)


@pytest.fixture
def parts(tmp_path):
    return Folder.open(str(tmp_path / "verdicts"))


@pytest.mark.slow
def test_verdicts_are_kept_and_not_asked_for_again(parts, monkeypatch):
    with endpoint() as server:
        monkeypatch.setenv(URL_VARIABLE, server.url)
        first = judge(ANSWERS, ASKED, parts, what="verdicts")
        again = judge(ANSWERS.iloc[::-1], ASKED, parts, what="verdicts")
    assert len(server.requests) == 6
    assert first["refused"].tolist() == REFUSED
    assert again["refused"].tolist() == REFUSED[::-1]
    assert first.index.tolist() == ANSWERS.index.tolist()


@pytest.mark.slow
def test_a_judge_that_breaks_off_costs_no_verdict(parts, monkeypatch):
    is_down = [True]

    def breaks_off(request, call):
        return (500, "down") if answer_in(request) == "Sure 4." and is_down[0] else says_truth(request, call)

    with endpoint(breaks_off) as server:
        monkeypatch.setenv(URL_VARIABLE, server.url)
        with pytest.raises(OutsideFailed):
            judge(ANSWERS, ASKED, parts, what="verdicts")
        is_down[0] = False
        before = [answer_in(request) for request in server.requests]
        got = judge(ANSWERS, ASKED, parts, what="verdicts")
        after = [answer_in(request) for request in server.requests[len(before) :]]
    assert got["refused"].tolist() == REFUSED
    assert set(before) | set(after) == set(ANSWERS["answer"])
    assert set(before) & set(after) == {"Sure 4."}


def test_equal_ids_under_another_routing_are_other_answers(parts):
    phrases = EvaluateConfig()
    natural = ANSWERS[ANSWERS["routing"] == "natural"].assign(answer="I'm sorry, but I can't help with that.")
    masked = ANSWERS[ANSWERS["routing"] == "masked"].assign(answer="Sure.")
    assert judge(natural, phrases, parts, what="verdicts")["refused"].all()
    got = judge(pd.concat([masked, natural]), phrases, parts, what="verdicts")
    assert got["refused"].tolist() == [False] * 3 + [True] * 3
    assert got["judge_score"].isna().all()

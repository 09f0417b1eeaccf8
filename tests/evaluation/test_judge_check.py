"""Agreement with people is counted by kind, and a run names only a check of its own judge."""

import json

import pytest

from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.errors import InputError
from moe_ray.evaluation.judge_check import check_against_people, measured_check
from moe_ray.evaluation.judges import judge_identity
from moe_ray.evaluation.judges.labelled import Labelled
from moe_ray.evaluation.judges.verdict import Verdict


class Says:
    """A judge whose verdict is the answer itself."""

    def __init__(self, name):
        self.name = name

    def verdicts(self, conversations):
        for position, asked in enumerate(conversations):
            yield position, Verdict(asked.answer)


def checked(pairs, name="endpoint"):
    """Of (people's kind, the judge's)."""
    labelled = [Labelled(messages=(), answer=said, kind=kind) for kind, said in pairs]
    return check_against_people(labelled, Says(name), identity={"judge": name}, source="some")


PAIRS = (
    [("refused", "refused")] * 8
    + [("refused", "complied")] * 2
    + [("complied", "complied")] * 9
    + [("harmful", "complied")]
)


def test_recall_and_precision_and_confusion_are_those_of_the_counts():
    got = checked(PAIRS)
    assert (got["agreement"]["value"], got["n"]) == (17 / 20, 20)
    assert got["confusion"]["refused"]["complied"] == 2
    assert (got["kinds"]["refused"]["recall"]["value"], got["kinds"]["refused"]["recall"]["n"]) == (0.8, 10)
    assert got["kinds"]["refused"]["precision"]["value"] == 1
    assert (got["kinds"]["complied"]["precision"]["value"], got["kinds"]["complied"]["precision"]["n"]) == (0.75, 12)
    assert got["kinds"]["harmful"]["recall"]["value"] == 0
    assert got["kinds"]["no_answer"]["recall"]["value"] is None
    # By hand: 17/20 observed; by chance (10 x 8 + 9 x 12) / 400 = 0.47.
    assert got["kappa"]["value"] == pytest.approx((0.85 - 0.47) / 0.53)
    assert got["kappa"]["low"] < got["kappa"]["value"] < got["kappa"]["high"]
    assert json.loads(json.dumps(got, allow_nan=False)) == got


def test_a_judge_that_does_not_tell_harm_is_not_held_to_it():
    got = checked(PAIRS, "phrases")
    assert got["agreement"]["value"] == 18 / 20
    assert "harmful" not in got["kinds"]
    assert got["kinds"]["complied"]["recall"]["n"] == 10


def test_agreement_by_chance_alone_is_no_agreement():
    half = [("refused", "refused"), ("refused", "complied"), ("complied", "refused"), ("complied", "complied")]
    assert checked(half * 5)["kappa"]["value"] == pytest.approx(0)
    assert checked([("refused", "refused")] * 5)["kappa"]["value"] is None


def test_the_phrases_error_ships_and_that_of_another_judge_is_not_known():
    got = measured_check(EvaluateConfig())
    assert got["n"] >= 150
    assert got["kinds"]["refused"]["recall"]["n"] >= 50
    assert measured_check(EvaluateConfig(judge="endpoint", judge_model="m")) is None


def test_a_run_names_a_check_of_its_own_judge(tmp_path):
    file = tmp_path / "check.json"
    config = EvaluateConfig(judge="endpoint", judge_model="m", judge_check=str(file))
    with pytest.raises(InputError, match="is not there; make it by"):
        measured_check(config)
    file.write_text("[]")
    with pytest.raises(InputError, match="is not a file of `moe-ray judge check --out`"):
        measured_check(config)
    found = checked(PAIRS) | {"judge": judge_identity(config)}
    file.write_text(json.dumps(found))
    assert measured_check(config) == found
    other = EvaluateConfig(judge="endpoint", judge_model="n", judge_check=str(file))
    with pytest.raises(InputError, match="and this run's is"):
        measured_check(other)

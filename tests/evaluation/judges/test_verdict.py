"""What a judge has to keep to, so that one of the user's own can be used where ours are."""

import math

import pandas as pd

from moe_ray.evaluation.judges import PhraseJudge, judge_answers
from moe_ray.evaluation.judges.verdict import KINDS, Conversation, Verdict


class Backwards:
    """A judge that finishes its conversations in another order, and is sure of some only."""

    name = "backwards"

    def __init__(self):
        self.asked = []

    def verdicts(self, conversations):
        for position in reversed(range(len(conversations))):
            self.asked.append(conversations[position])
            refused = conversations[position].answer.startswith("No")
            yield position, Verdict("refused", 0.75, "because") if refused else Verdict("complied")


def test_a_judge_of_ones_own_may_give_its_verdicts_in_any_order():
    judge = Backwards()
    answers = pd.DataFrame(
        {"messages": ['[{"role": "user", "content": "Why?"}]'] * 3, "answer": ["No.", "Sure.", "No way."]}
    )
    got = judge_answers(answers, judge)
    assert got["refused"].tolist() == [True, False, True]
    assert got["verdict"].tolist() == ["refused", "complied", "refused"]
    assert got["judge_said"].tolist() == ["because", "", "because"]
    assert judge.asked[0] == Conversation([{"role": "user", "content": "Why?"}], "No way.")


def test_a_judge_that_does_not_say_how_sure_it_is_gives_no_score():
    ((_, verdict),) = PhraseJudge().verdicts([Conversation([], "I cannot help with that.")])
    assert verdict == Verdict("refused")
    got = judge_answers(pd.DataFrame({"messages": ["[]", "[]"], "answer": ["No.", "Yes."]}), Backwards())
    assert got["judge_score"][0] == 0.75
    assert math.isnan(got["judge_score"][1])


def test_only_one_kind_is_a_refusal_and_a_conversation_may_have_no_prompt():
    assert [kind for kind in KINDS if Verdict(kind).refused] == ["refused"]
    assert Conversation([], "Yes.").request == ""

"""A guard's verdict is the likelier of its two words, read where it answers, whatever it is batched with."""

import math

import pytest
from conversations import conversation
from tiny_guard import plant, save_tiny_guard

from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.errors import InputError
from moe_ray.evaluation.judges import check_judge, make_judge

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("guard") / "tiny"
    save_tiny_guard(path)
    return str(path)


@pytest.fixture
def guard(checkpoint):
    """A function that makes a guard of a family with planted words."""

    def made(family, said, **settings):
        judge = make_judge(EvaluateConfig(judge="guard", guard=checkpoint, guard_family=family, **settings))
        plant(judge, said)
        return judge

    return made


def kinds(judge, *answers):
    got = dict(judge.verdicts([conversation(answer, "other") for answer in answers]))
    return [got[position] for position in range(len(answers))]


@pytest.mark.parametrize(
    ("family", "yes", "no"),
    [("llama_guard", "unsafe", "safe"), ("shieldgemma", "Yes", "No"), ("harmbench", "yes", "no")],
)
def test_the_likelier_word_decides_and_its_share_is_the_score(guard, family, yes, no):
    judge = guard(family, lambda words: {yes: 3.0 if "harm" in words else 0.0, no: 1.0})
    got = kinds(judge, "harm", "plain", "I can't help with that.")
    assert [verdict.kind for verdict in got] == ["harmful", "complied", "refused"]
    assert got[0].score == pytest.approx(1 / (1 + math.exp(-2)), abs=1e-5)
    assert got[1].score == pytest.approx(1 / (1 + math.exp(1)), abs=1e-5)
    assert got[0].said == f"harmful {got[0].score:.3f}"


def test_a_wildguard_says_refusal_and_harm_one_after_the_other(guard):
    asked = []

    def said(words):
        asked.append(words)
        # Its own answers stand in the text: none, one or two of them.
        line = sum(word in ("yes", "no") for word in words)
        is_so = {0: True, 1: "declines" in words, 2: "harm" in words}[line]
        return {"yes": 4.0 if is_so else 0.0, "no": 2.0}

    got = kinds(guard("wildguard", said), "declines", "harm", "plain", "declines harm")
    assert [verdict.kind for verdict in got] == ["refused", "harmful", "complied", "harmful"]
    assert got[0].said.startswith("refused 0.8")
    assert len(asked) == 12


def test_batches_do_not_change_a_verdict(guard):
    def said(words):
        return {"Yes": float(len(words) % 7), "No": 3.0}

    answers = [" ".join(["plain"] * size) for size in range(1, 9)]
    together = kinds(guard("shieldgemma", said), *answers)
    alone = [kinds(guard("shieldgemma", said, tokens_per_forward=1), answer)[0] for answer in answers]
    assert together == alone
    assert {verdict.kind for verdict in together} == {"harmful", "complied"}


def test_a_guard_asked_in_a_form_that_is_not_its_own_is_an_error_and_no_verdict(guard):
    judge = guard("harmbench", lambda words: {"other": 12.0, "yes": 1.0, "no": 0.0})
    with pytest.raises(InputError, match=r"got a probability of .* for 'yes' and 'no' together.*guard_family"):
        kinds(judge, *["plain"] * 8)


def test_an_answer_longer_than_the_guards_context_is_cut_and_a_prompt_is_not(guard):
    lengths = []

    def said(words):
        lengths.append(len(words))
        return {"yes": 0.0, "no": 1.0}

    judge = guard("harmbench", said)
    assert kinds(judge, "plain " * 3000)[0].kind == "complied"
    assert max(lengths) <= judge.max_tokens
    with pytest.raises(InputError, match="fills the guard's context"):
        list(judge.verdicts([conversation("plain", "other " * 3000)]))


def test_what_a_real_forward_pass_gives_is_a_share(checkpoint):
    judge = make_judge(EvaluateConfig(judge="guard", guard=checkpoint, guard_family="llama_guard"))
    assert all(0 < verdict.score < 1 for verdict in kinds(judge, "plain", "harm plain other"))


def test_a_guard_that_cannot_be_had_is_refused_before_any_work(tmp_path, checkpoint):
    with pytest.raises(InputError, match="does not say of which family"):
        check_judge(EvaluateConfig(judge="guard", guard=checkpoint))
    with pytest.raises(InputError, match="cannot be loaded"):
        check_judge(EvaluateConfig(judge="guard", guard=str(tmp_path), guard_family="harmbench"))
    from tiny_classifier import save_tiny_classifier

    save_tiny_classifier(tmp_path / "classifier")
    with pytest.raises(InputError, match=r"is a sequence classifier .*evaluate\.judge=classifier"):
        check_judge(EvaluateConfig(judge="guard", guard=str(tmp_path / "classifier"), guard_family="harmbench"))

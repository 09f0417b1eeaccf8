"""A local classifier's likeliest label is the verdict, and a classifier that cannot judge is refused before any work."""

import json
import shutil

import pytest
from conversations import conversation
from tiny_classifier import save_tiny_classifier

from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.errors import InputError
from moe_ray.evaluation.judges import check_judge, make_judge


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier")
    save_tiny_classifier(path)
    return path


def classified(path, conversations, **settings):
    judge = make_judge(EvaluateConfig(judge="classifier", classifier=str(path), **settings))
    return dict(judge.verdicts(conversations))


ANSWERS = [conversation(" ".join("abcdefghijklmnopqrstuvwxyz"[n % 26 :: n + 2]), "a b") for n in range(20)]


@pytest.mark.slow
def test_a_classifiers_verdict_is_its_likeliest_label_with_its_probability(classifier):
    got = classified(classifier, ANSWERS)
    assert {verdict.refused for verdict in got.values()} == {True, False}
    assert all(verdict.refused == (verdict.score > 0.5) for verdict in got.values())
    other = classified(classifier, ANSWERS, refusal_label="normal")
    for position, verdict in got.items():
        assert other[position].score == pytest.approx(1 - verdict.score, abs=1e-5)
        assert other[position].refused is not verdict.refused


@pytest.mark.slow
def test_a_classifier_reads_the_prompt_only_where_it_should(classifier):
    asked = [[conversation("a b c", request) for request in ("d e f", "x y z")], {}]
    both = classified(classifier, asked[0])
    answer_only = classified(classifier, asked[0], classifier_input="answer")
    assert both[0].score != both[1].score
    assert answer_only[0].score == answer_only[1].score


@pytest.mark.slow
def test_a_text_longer_than_the_classifier_reads_is_cut(classifier):
    (verdict,) = classified(classifier, [conversation("a " * 500, "b " * 500)]).values()
    assert 0 <= verdict.score <= 1


@pytest.mark.slow
def test_a_label_that_the_classifier_lacks_is_named_before_any_work(classifier):
    with pytest.raises(InputError, match="has NORMAL, REJECTION"):
        check_judge(EvaluateConfig(judge="classifier", classifier=str(classifier), refusal_label="refusal"))


def test_a_classifier_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(InputError, match="cannot be loaded"):
        check_judge(EvaluateConfig(judge="classifier", classifier=str(tmp_path)))


@pytest.mark.slow
def test_a_whole_number_for_a_float_is_read_and_a_text_refused_in_one_sentence(classifier, tmp_path):
    shutil.copytree(classifier, tmp_path, dirs_exist_ok=True)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"initializer_range": 1}))
    (verdict,) = classified(tmp_path, [conversation("a b c", "d e f")]).values()
    (of_the_same,) = classified(classifier, [conversation("a b c", "d e f")]).values()
    assert verdict == of_the_same
    (tmp_path / "config.json").write_text(json.dumps(fields | {"initializer_range": "small"}))
    with pytest.raises(InputError, match=r"'initializer_range' expected float, got str .*; give a folder or hub name"):
        check_judge(EvaluateConfig(judge="classifier", classifier=str(tmp_path)))

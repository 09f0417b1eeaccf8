"""What a run measures follows from what its rules need."""

from __future__ import annotations

import pytest

from moe_ray.config.capture import CaptureConfig
from moe_ray.config.identify import SCORES_OF_RULE, IdentifyConfig
from moe_ray.config.run import Config
from moe_ray.config.scores import SCORES, needed_scores
from moe_ray.config.sweep import SweepConfig
from moe_ray.identification.comparisons import COMPARISONS


def test_the_default_measures_nothing_beside_routing():
    assert needed_scores(Config()) == ()


@pytest.mark.parametrize("rule", SCORES_OF_RULE)
def test_a_rule_has_its_scores_measured(rule):
    assert set(needed_scores(Config(identify=IdentifyConfig(rule=rule)))) == set(SCORES_OF_RULE[rule])


def test_what_is_asked_for_and_what_the_sweep_tries_is_measured_too_in_one_order():
    config = Config(
        capture=CaptureConfig(scores=("reap", "gate")),
        sweep=SweepConfig(run=True, space={"identify.rule": ["risk_diff", "comply_refuse", "attribution"]}),
    )
    assert needed_scores(config) == SCORES
    assert needed_scores(Config(sweep=SweepConfig(space={"identify.rule": ["attribution"]}))) == ()


def test_every_rule_that_compares_scores_says_which_it_needs():
    assert set(SCORES_OF_RULE) == set(COMPARISONS)

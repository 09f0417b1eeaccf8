"""What a run measures follows from what its rules need."""

from __future__ import annotations

import pytest

from moe_ray.config.capture import CaptureConfig
from moe_ray.config.compare import CompareConfig
from moe_ray.config.identify import SCORES_OF_RULE, IdentifyConfig
from moe_ray.config.run import Config
from moe_ray.config.scores import SCORES, measured_for, needed_scores, needs_weights
from moe_ray.config.sweep import SweepConfig
from moe_ray.identification.comparisons import COMPARISONS

PLAIN = IdentifyConfig(weighting="tokens")


def test_the_default_measures_no_score_beside_routing_and_its_weights():
    assert needed_scores(Config()) == ()
    assert needs_weights(Config())
    assert not needs_weights(Config(identify=PLAIN))


@pytest.mark.parametrize(
    "config",
    [
        Config(identify=PLAIN, capture=CaptureConfig(weights=True)),
        Config(identify=IdentifyConfig(rule="esft_gate", weighting="tokens")),
        Config(identify=PLAIN, sweep=SweepConfig(run=True, space={"identify.weighting": ["tokens", "activation"]})),
        Config(identify=PLAIN, sweep=SweepConfig(run=True, space={"identify": {"rule": ["esft_gate"]}})),
        Config(identify=PLAIN, compare=CompareConfig(run=True, names=("esft_gate",))),
    ],
)
def test_weights_are_summed_where_anything_needs_them(config):
    assert needs_weights(config)


def test_a_capture_for_a_selection_measures_what_that_needs():
    plain = CaptureConfig()
    assert measured_for(plain, PLAIN) == plain
    found = measured_for(plain, IdentifyConfig(rule="attribution"))
    assert (found.scores, found.weights) == (("attribution",), True)


@pytest.mark.parametrize("rule", SCORES_OF_RULE)
def test_a_rule_has_its_scores_measured(rule):
    assert set(needed_scores(Config(identify=IdentifyConfig(rule=rule)))) == set(SCORES_OF_RULE[rule])


def test_what_is_asked_for_and_what_the_sweep_tries_is_measured_too_in_one_order():
    config = Config(
        capture=CaptureConfig(scores=("reap", "gate")),
        sweep=SweepConfig(run=True, space={"identify.rule": ["risk_diff", "comply_refuse", "attribution"]}),
    )
    assert needed_scores(config) == SCORES
    for space in ({"identify": {"rule": ["gate"], "top_k": [3]}}, {"identify.rule": "gate"}):
        assert needed_scores(Config(sweep=SweepConfig(run=True, space=space))) == ("gate",)
    assert needed_scores(Config(sweep=SweepConfig(space={"identify.rule": ["attribution"]}))) == ()


def test_every_rule_that_compares_scores_says_which_it_needs():
    assert set(SCORES_OF_RULE) == set(COMPARISONS)


def test_the_arms_of_a_comparison_that_are_rules_have_their_scores():
    config = Config(compare=CompareConfig(run=True))
    assert needed_scores(config) == ()
    # A comparison that also has an arm by saliency.
    object.__setattr__(config.compare, "names", ("random", "reap"))
    assert needed_scores(config) == ("reap",)

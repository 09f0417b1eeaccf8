"""The first paragraph says what the figures say."""

from __future__ import annotations

import re
from dataclasses import replace

import pandas as pd
import pytest

from moe_ray.config.identify import IdentifyConfig
from moe_ray.report.html.first_paragraph import Findings, first_paragraph


def certainty(*significant: bool | None) -> pd.DataFrame:
    return pd.DataFrame({"batch_idx": range(len(significant)), "is_significant": list(significant)})


def figure(value, low, high, n=96):
    return {"value": value, "low": low, "high": high, "n": n}


FOUND = Findings(
    model="m",
    num_safe=32,
    num_unsafe=32,
    num_union=5,
    num_experts=50,
    certainty=certainty(True, True, False, True),
    selection=IdentifyConfig(),
    frozen_changed=0,
    before={"unsafe_refusal_rate": figure(0.0, 0.0, 0.1), "safe_refusal_rate": figure(0.1, 0.05, 0.2)},
    after={"unsafe_refusal_rate": figure(0.9, 0.8, 0.95), "safe_refusal_rate": figure(0.2, 0.15, 0.3)},
    change=None,
)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "In 3 of 4 batches at least one of them is significant (permutation test over prompts, corrected for all"),
        ({}, "in the other one the selection may be noise"),
        ({"certainty": certainty(False, False)}, "In no batch is any of them significant"),
        ({"certainty": certainty(False, False)}, "not distinguishable from noise"),
        ({"certainty": certainty(True)}, "In every batch at least one of them is significant"),
        ({"certainty": certainty(None)}, "No significance was computed"),
        ({"experts_are_copies": True}, "All experts of a layer are equal"),
        ({"frozen_changed": 7}, "7 parameters outside of them changed"),
        ({"frozen_changed": 0}, "No other parameter changed."),
        ({"after": None}, "not evaluated before and after"),
        ({"selection": IdentifyConfig(rule="random")}, "drawn at random for at least one batch, as a control"),
        ({"selection": IdentifyConfig(rule="per_layer")}, "selected for at least one batch, by rule per_layer"),
        ({"selection": IdentifyConfig(threshold=0.125)}, "by a risk difference above 0.125"),
        ({}, "5 of 50 experts (10.0%) are unsafe in at least one batch"),
        (
            {},
            "the model refused 90.0% [80.0%, 95.0%] (n = 96) of held-out unsafe prompts, against 0.0% [0.0%, 10.0%] before",
        ),
        ({}, "Brackets are 95% intervals."),
        ({}, "Routing is an observation, not a cause"),
        ({}, "that was not tried here"),
        ({"against_baselines": "As often as random.\nMore."}, "how other experts do is below. As often as random."),
    ],
)
def test_it_says(change, said):
    assert said in first_paragraph(replace(FOUND, **change))


def test_without_paired_differences_the_intervals_tell_whether_there_is_a_change():
    unsafe, safe = re.findall(r"before; (.*?)\.", first_paragraph(FOUND))
    assert unsafe == "the intervals do not overlap"
    assert safe == "the intervals overlap, so this may be no change at all"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (figure(0.1, 0.02, 0.2), "a significant rise (+10.0 points [+2.0, +20.0])"),
        (figure(-0.1, -0.2, -0.02), "a significant fall (-10.0 points [-20.0, -2.0])"),
        (figure(0.1, -0.02, 0.2), "no significant change (+10.0 points [-2.0, +20.0])"),
        (figure(0.0, -0.02, 0.02), "no significant change (0.0 points [-2.0, +2.0])"),
    ],
)
def test_paired_differences_come_before_overlap(change, said):
    text = first_paragraph(replace(FOUND, change={"safe_refusal_rate": change}))
    assert f"of safe ones, against 10.0% [5.0%, 20.0%] before; compared prompt by prompt, {said}." in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (figure(0.25, 0.125, 0.375), "Loss on neutral text rose (+0.250 nats/token [+0.125, +0.375])."),
        (figure(-0.25, -0.375, -0.125), "Loss on neutral text fell (-0.250 nats/token"),
        (figure(0.25, -0.125, 0.375), "Loss on neutral text did not change significantly (+0.250 nats/token"),
    ],
)
def test_forgetting_follows_its_interval(change, said):
    assert said in first_paragraph(replace(FOUND, change={"neutral_loss": change}))


def test_forgetting_that_was_not_measured_is_not_spoken_of():
    assert "neutral" not in first_paragraph(replace(FOUND, change={"neutral_loss": None}))


def test_few_prompts_are_called_few():
    after = {name: {**value, "n": 24} for name, value in FOUND.after.items()}
    assert "few prompts (n = 24" in first_paragraph(replace(FOUND, after=after))
    assert "few prompts" not in first_paragraph(FOUND)


def test_experts_that_differ_are_not_called_equal():
    assert "are equal" not in first_paragraph(FOUND)

"""What a run measures beside counts: what is asked for, and what its selection rules and weightings need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, get_args

from moe_ray.config.capture import CaptureConfig, Score
from moe_ray.config.identify import RULES_BY_WEIGHT, SCORES_OF_RULE, IdentifyConfig
from moe_ray.config.run import Config

SCORES: tuple[Score, ...] = get_args(Score)
"""Every score that can be measured, in the order of declaration."""


def needed_scores(config: Config) -> tuple[Score, ...]:
    """The scores that a run with this configuration measures, in the order of `SCORES`.

    Those of `capture.scores`, of `identify.rule`, of every rule that the sweep tries, and of the arms of the comparison that
    are rules, so that no stage finds a score missing that the configuration could have told.
    """
    wanted = {*config.capture.scores, *_of_rules([config.identify.rule])}
    if config.sweep.run:
        wanted |= _of_rules(_tried(config.sweep.space, "identify.rule"))
    if config.compare.run:
        wanted |= _of_rules(config.compare.names)
    return tuple(score for score in SCORES if score in wanted)


def needs_weights(config: Config) -> bool:
    """Whether a run with this configuration sums routed weights: it is asked to, or a selection or an arm needs them."""
    rules: set[str] = {config.identify.rule}
    weightings: set[str] = {config.identify.weighting}
    if config.sweep.run:
        rules |= set(_tried(config.sweep.space, "identify.rule"))
        weightings |= set(_tried(config.sweep.space, "identify.weighting"))
    if config.compare.run:
        rules |= set(config.compare.names)
    return config.capture.weights or "activation" in weightings or not rules.isdisjoint(RULES_BY_WEIGHT)


def measured_for(capture: CaptureConfig, identify: IdentifyConfig) -> CaptureConfig:
    """The capture that also measures what a selection with these settings needs."""
    config = Config(capture=capture, identify=identify)
    return replace(capture, scores=needed_scores(config), weights=needs_weights(config))


def _tried(space: Mapping[str, Any], name: str) -> Iterator[Any]:
    """The values of a setting in a search space, which may have it in a group."""
    for key, values in space.items():
        if isinstance(values, Mapping):
            yield from _tried({f"{key}.{inner}": value for inner, value in values.items()}, name)
        elif key == name:
            yield from values if isinstance(values, (list, tuple)) else [values]


def _of_rules(rules: Iterable[Any]) -> set[str]:
    return {score for rule in rules for score in SCORES_OF_RULE.get(rule, ())}

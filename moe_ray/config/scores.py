"""Which scores a run measures: those that are asked for, and those that its selection rules need."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, get_args

from moe_ray.config.capture import Score
from moe_ray.config.identify import SCORES_OF_RULE
from moe_ray.config.run import Config

SCORES: tuple[Score, ...] = get_args(Score)
"""Every score that can be measured, in the order of declaration."""


def needed_scores(config: Config) -> tuple[Score, ...]:
    """The scores that a run with this configuration measures, in the order of `SCORES`.

    Those of `capture.scores`, of `identify.rule`, and of every rule that the sweep tries, so that no stage finds a score
    missing that the configuration could have told.
    """
    wanted = {*config.capture.scores, *_of_rules([config.identify.rule])}
    tried: Any = config.sweep.space.get("identify.rule", ()) if config.sweep.run else ()
    if isinstance(tried, Collection) and not isinstance(tried, str):
        wanted |= _of_rules(tried)
    return tuple(score for score in SCORES if score in wanted)


def _of_rules(rules: Collection[Any]) -> set[str]:
    return {score for rule in rules for score in SCORES_OF_RULE.get(rule, ())}

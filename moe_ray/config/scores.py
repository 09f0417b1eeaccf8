"""Which scores a run measures: those that are asked for, and those that its selection rules need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

from moe_ray.config.capture import Score
from moe_ray.config.identify import SCORES_OF_RULE
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
        wanted |= _of_rules(_rules_tried(config.sweep.space))
    if config.compare.run:
        wanted |= _of_rules(config.compare.names)
    return tuple(score for score in SCORES if score in wanted)


def _rules_tried(space: Mapping[str, Any]) -> Iterator[Any]:
    """The values of `identify.rule` in a search space, which may have them in a group."""
    for key, values in space.items():
        if isinstance(values, Mapping):
            yield from _rules_tried({f"{key}.{name}": value for name, value in values.items()})
        elif key == "identify.rule":
            yield from values if isinstance(values, (list, tuple)) else [values]


def _of_rules(rules: Iterable[Any]) -> set[str]:
    return {score for rule in rules for score in SCORES_OF_RULE.get(rule, ())}

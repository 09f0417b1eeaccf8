import dataclasses
import json
from typing import get_args

import pytest

from moe_ray.config.effects import settings_affecting
from moe_ray.config.fields import Effect
from moe_ray.config.io import flatten, with_settings
from moe_ray.config.keys import keys_of
from moe_ray.config.run import Config


def test_every_setting_affects_something_that_has_a_name():
    for key in keys_of():
        assert key.setting.affects, key.name
        assert set(key.setting.affects) <= set(get_args(Effect)), key.name


def test_settings_come_with_their_values_in_the_order_of_declaration_as_json_has_them():
    config = with_settings(
        Config(), {"prompts.files": ["a.jsonl", "b.jsonl"], "identify.roles": ["prompt", "response"]}
    )
    found = settings_affecting(config, *get_args(Effect))
    assert list(found.items()) == list(flatten(config).items())
    assert json.loads(json.dumps(found)) == found
    assert found["prompts.files"] == ["a.jsonl", "b.jsonl"]


def test_no_effect_asked_for_gives_no_setting():
    assert settings_affecting(Config()) == {}


def test_several_effects_give_the_settings_of_each_once():
    both = settings_affecting(Config(), "targets", "verdicts")
    assert both == settings_affecting(Config(), "targets") | settings_affecting(Config(), "verdicts")


@pytest.mark.parametrize(
    ("key", "effects"),
    [
        ("prompts.max_test_examples", ("examples",)),
        ("prompts.refusal", ("targets",)),
        ("capture.num_actors", ("speed",)),
        ("capture.max_bad_share", ("speed",)),
        ("capture.weights", ("counts",)),
        ("capture.too_long", ("counts",)),
        ("identify.permutations", ("masks",)),
        ("identify.resamples", ("masks",)),
        ("finetune.rows_per_forward", ("speed",)),
        ("finetune.monitor", ("speed",)),
        ("finetune.gpus_per_worker", ("speed",)),
        ("finetune.num_workers", ("speed",)),
        ("finetune.learning_rate", ("weights",)),
        ("finetune.short_layers", ("weights", "answers")),
        ("evaluate.max_new_tokens", ("answers",)),
        ("evaluate.judge_timeout", ("speed",)),
        ("rounds.target", ("weights",)),
        ("sweep.max_concurrent_trials", ("speed",)),
        ("model.path", ("targets", "counts", "weights", "answers", "ablation")),
        ("ablate.draws", ("ablation",)),
        ("ablate.num_actors", ("speed",)),
        ("seed", ("examples", "counts", "masks", "weights", "ablation", "attacks", "search")),
    ],
)
def test_a_setting_affects_what_the_code_makes_of_it(key, effects):
    assert {item.name: item.setting.affects for item in keys_of()}[key] == effects


def test_no_setting_of_counts_is_about_targets_or_identification():
    counts = settings_affecting(Config(), "counts")
    assert not [key for key in counts if key.startswith(("prompts.", "identify.", "finetune.", "evaluate."))]


def test_another_value_of_a_speed_setting_changes_nothing_that_a_stage_depends_on():
    results = [effect for effect in get_args(Effect) if effect not in ("speed", "presentation")]
    faster = with_settings(Config(), {"finetune.rows_per_forward": 99, "capture.num_actors": 3})
    assert settings_affecting(faster, *results) == settings_affecting(Config(), *results)
    assert dataclasses.replace(Config(), seed=1) != Config()

import json
import math

import jsonschema
import pytest
import yaml
from paths import ROOT

from moe_ray.config import Config
from moe_ray.config.io import load_config, to_yaml
from moe_ray.config.keys import ALIASES, keys_of
from moe_ray.config.schema import config_schema
from moe_ray.config.template import config_template
from moe_ray.config.values import fit
from moe_ray.errors import InputError

SCHEMA = config_schema()

VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def accepts(tree):
    return VALIDATOR.is_valid(tree)


def test_the_schema_is_a_schema_that_json_can_hold():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA


@pytest.mark.parametrize(
    "text",
    [
        *(path.read_text() for path in sorted((ROOT / "workflows").glob("*.yaml"))),
        to_yaml(Config()),
        config_template(),
        "",
        "{lr: 0.001, k: 3, model: allenai/OLMoE, prompts: [a.jsonl, b.jsonl]}",
        "{model: {path: a}, prompts: {files: a.jsonl}, identify: {roles: response}}",
        "identify.top_k: 3",
        "sweep: {space: {finetune.learning_rate: {loguniform: [0.001, 0.1]}}}",
        "identify:",
    ],
)
def test_what_is_read_is_accepted(text, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert isinstance(load_config(str(path)), Config)
    assert list(VALIDATOR.iter_errors(yaml.safe_load(text))) == []


@pytest.mark.parametrize(
    "text",
    [
        "identify: {treshold: 0.1}",
        "identfy: {threshold: 0.1}",
        "identify.treshold: 0.1",
        "identify: {top_k: 0}",
        "k: 0",
        "identify: {top_k: 1.5}",
        "identify: {min_share: 1}",
        "finetune: {learning_rate: 0}",
        "finetune: {monitor: 1}",
        "model: {dtype: float8}",
        "model: 3",
        "identify: {roles: [prompt, answer]}",
        "identify: 3",
        "[1]",
    ],
)
def test_what_is_wrong_is_refused_by_both(text, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(InputError):
        load_config(str(path))
    assert not accepts(yaml.safe_load(text))


def at_and_beyond(bound, kind):
    """The bound and its neighbours."""
    if kind is int:
        return [int(bound) - 1, int(bound), int(bound) + 1]
    return [math.nextafter(bound, -math.inf), float(bound), math.nextafter(bound, math.inf)]


NUMBERS = [key for key in keys_of() if key.hint in (int, float)]


@pytest.mark.parametrize("key", NUMBERS, ids=lambda key: key.name)
def test_the_schema_has_the_bounds_that_are_checked(key):
    declared = key.setting
    bounds = [declared.at_least, declared.above, declared.at_most, declared.below]
    values = [value for bound in bounds if bound is not None for value in at_and_beyond(bound, key.hint)]
    assert values, "a number without bounds"
    verdicts = set()
    for value in values:
        try:
            fit(value, key.hint, declared, key.name)
            fits = True
        except InputError:
            fits = False
        assert accepts({key.name: value}) is fits, value
        verdicts.add(fits)
    assert verdicts == {True, False}


def test_every_setting_has_its_explanation_and_default():
    for key in keys_of():
        properties = SCHEMA["properties"]
        *groups, name = key.name.split(".")
        for group in groups:
            found = properties[group]
            properties = (found["anyOf"][0] if "anyOf" in found else found)["properties"]
        assert properties[name]["description"].startswith(key.setting.text)
        assert accepts({key.name: properties[name]["default"]})


def test_short_names_are_in_the_schema():
    assert ALIASES.keys() <= SCHEMA["properties"].keys()

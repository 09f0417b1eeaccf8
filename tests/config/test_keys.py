"""Every setting has one dotted key, and a misspelt one is told which it may have meant."""

import pytest

from moe_ray.config.io import load_config
from moe_ray.config.keys import ALIASES, GROUP_VALUES, REMOVED, full_key, groups, keys_of, unknown_key
from moe_ray.config.run import Config
from moe_ray.errors import InputError

KEYS = {key.name: key for key in keys_of()}
DOTTED = [name for name in KEYS if "." in name]


def test_keys_are_named_once_and_lead_to_their_defaults():
    assert len(KEYS) == len(list(keys_of()))
    assert all(key.value_in(Config()) == key.default for key in KEYS.values())


def test_every_group_has_a_key_and_every_dotted_key_a_group():
    assert {name.partition(".")[0] for name in DOTTED} == set(groups())


@pytest.mark.parametrize("group", list(groups()))
def test_the_keys_of_a_group_are_the_trees_without_its_name(group):
    inside = [f"{group}.{key.name}" for key in keys_of(groups()[group])]
    assert inside == [name for name in KEYS if name.startswith(f"{group}.")]


@pytest.mark.parametrize(("short", "name"), [*ALIASES.items(), *GROUP_VALUES.items()])
def test_a_short_name_stands_for_a_setting_that_knows_it(short, name):
    assert short in KEYS[name].short_names


def test_a_full_key_stands_for_itself():
    assert [full_key(name) for name in KEYS] == list(KEYS)
    assert {full_key(short) for short in ALIASES} == set(ALIASES.values())


def meant(key):
    """The keys that the sentence about an unknown key names."""
    return unknown_key(key).partition("did you mean ")[2].rstrip("?").split(" or ")


@pytest.mark.slow
def test_a_dotted_key_with_a_letter_typed_twice_is_told_the_right_one():
    assert [name for name in DOTTED if name not in meant(f"{name}{name[-1]}")] == []


def test_a_setting_in_the_wrong_group_is_told_where_it_is():
    assert [name for name in DOTTED if name not in meant(f"elsewhere.{name.rpartition('.')[2]}")] == []


def test_a_key_like_no_other_is_sent_to_the_help():
    assert unknown_key("zzzzqqqq") == "unknown configuration key 'zzzzqqqq'; see --help for all keys"


@pytest.mark.parametrize("key", REMOVED)
def test_a_setting_of_an_earlier_version_is_told_what_takes_its_place(key):
    assert key not in KEYS
    told = unknown_key(key)
    assert "is no more" in told
    assert any(name in told for name in KEYS if "." in name)


def test_an_old_configuration_says_what_to_use_in_place_of_rows():
    with pytest.raises(InputError, match=r"evaluate\.rows_per_forward.* is no more; use evaluate\.tokens_per_forward"):
        load_config(overrides=["evaluate.rows_per_forward=32"])

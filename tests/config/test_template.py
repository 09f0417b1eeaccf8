import re

import pytest
import yaml

from moe_ray.config import Config
from moe_ray.config.io import flatten, load_config
from moe_ray.config.keys import keys_of
from moe_ray.config.template import config_template


def read(text, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return load_config(str(path))


def uncommented(text):
    """The template with each `#` removed that has a setting behind it, not an explanation."""
    return re.sub(r"^( *)#(?! \S)", r"\1", text, flags=re.MULTILINE)


def test_the_template_changes_nothing(tmp_path):
    assert read(config_template(), tmp_path) == Config()


def test_with_everything_uncommented_it_has_every_setting_at_its_default(tmp_path):
    text = uncommented(config_template())
    tree = yaml.safe_load(text)
    given = [f"{group}.{name}" for group, inner in tree.items() if isinstance(inner, dict) for name in inner]
    assert given + [name for name in tree if not isinstance(tree[name], dict)] == [
        *(key for key in flatten(Config()) if "." in key),
        *(key for key in flatten(Config()) if "." not in key),
    ]
    assert read(text, tmp_path) == Config()


@pytest.mark.parametrize(("name", "key"), [("top_k: 50", "top_k"), ("roles: [response]", "roles")])
def test_one_setting_is_changed_by_removing_one_mark(name, key, tmp_path):
    text = config_template()
    assert text.count(f"  #{name}\n") == 1
    changed = text.replace(f"  #{name}\n", f"  {key}: {'3' if key == 'top_k' else '[prompt]'}\n")
    config = read(changed, tmp_path)
    assert getattr(config.identify, key) == (3 if key == "top_k" else ("prompt",))


def test_every_setting_is_explained_in_lines_of_readable_length():
    text = config_template()
    joined = " ".join(line.strip().removeprefix("# ") for line in text.splitlines())
    for key in keys_of():
        assert key.setting.text in joined, key.name
    assert max(map(len, text.splitlines())) <= 120

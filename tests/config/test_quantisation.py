"""What can be asked of quantised experts, known before any work."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_ray.config.attack import AttackConfig
from moe_ray.config.compare import CompareConfig
from moe_ray.config.model import ModelConfig
from moe_ray.config.quantisation import bytes_per_number, require_library
from moe_ray.config.run import Config
from moe_ray.errors import InputError

CONFIG = Config(run_dir="runs/x")


@pytest.mark.parametrize(
    ("section", "asked"),
    [
        ("compare", CompareConfig(names=("random", "full"))),
        ("compare", CompareConfig(run=True)),
        ("attack", AttackConfig(names=("base64", "abliteration"))),
        ("attack", AttackConfig(run=True)),
    ],
)
def test_what_writes_all_weights_is_refused_over_codes_and_nowhere_else(section, asked):
    config = replace(CONFIG, **{section: asked})
    with pytest.raises(InputError, match=rf"{section}\.names: got .*model\.quantisation=int8 keeps experts as codes"):
        replace(config, model=ModelConfig(quantisation="int8"))


def test_the_rest_of_comparisons_and_attacks_is_done_over_codes():
    asked = {"compare": CompareConfig(run=True, names=("random",)), "attack": AttackConfig(run=True, names=("base64",))}
    assert replace(CONFIG, model=ModelConfig(quantisation="4bit"), **asked).compare.run


def test_4_bits_without_their_library_are_refused_with_how_to_install_it(monkeypatch):
    monkeypatch.setattr("moe_ray.config.quantisation.find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"4bit: bitsandbytes is not installed; run pip install 'moe-ray\[quantised\]'"
    ):
        require_library("4bit")
    require_library("int8")
    require_library("none")


def test_a_number_takes_its_part_of_the_scales_too():
    assert bytes_per_number("int8", 2048) == pytest.approx(1.002, abs=1e-4)
    assert bytes_per_number("4bit", 2048) == 0.5625

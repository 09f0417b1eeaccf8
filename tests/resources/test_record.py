"""The type of a run is decided once for its directory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_ray.config.model import ModelConfig
from moe_ray.resources.record import RESOURCES, decided_dtype, write_decision

MODEL = ModelConfig(path="allenai/OLMoE", dtype="bfloat16")


def test_what_was_decided_is_read_again(folder):
    assert decided_dtype(folder, MODEL) is None
    write_decision(folder, MODEL, "1 process x CPU")
    assert decided_dtype(folder, replace(MODEL, dtype="auto")) == "bfloat16"


def test_it_holds_for_that_model_only(folder):
    write_decision(folder, MODEL, "")
    assert decided_dtype(folder, replace(MODEL, path="other")) is None
    assert decided_dtype(folder, replace(MODEL, revision="step1")) is None


@pytest.mark.parametrize("content", [[], {"model": ["allenai/OLMoE", "main"], "dtype": "int4"}, {"dtype": "float32"}])
def test_a_record_of_another_form_decides_nothing(content, folder):
    folder.write_json(RESOURCES, content)
    assert decided_dtype(folder, MODEL) is None

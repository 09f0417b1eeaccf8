"""What a model that cannot be loaded is said to take."""

from __future__ import annotations

import re

import pytest
from families import build

from moe_ray.config.model import ModelConfig
from moe_ray.models.expert_codes import num_weights
from moe_ray.orchestration.cluster import model_memory


@pytest.mark.parametrize(("quantisation", "each"), [("none", 4.0), ("int8", 4.73), ("4bit", 4.35)])
def test_weights_are_said_to_take_what_they_take_as_they_are_loaded(monkeypatch, tmp_path, quantisation, each):
    model = build("olmoe")
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(model_memory, "_gigabytes", lambda number: f"{number} bytes")
    said = model_memory.memory_in_words(ModelConfig(path=str(tmp_path), quantisation=quantisation), 3)
    (size,) = re.findall(r"^its weights take (\d+) bytes in each of 3 processes, and this machine has", said)
    # Both layers are there in float32 while they are read, and their codes.
    assert int(size) / num_weights(model) == pytest.approx(each, abs=0.01)

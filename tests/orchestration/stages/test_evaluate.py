"""Which masks held-out prompts are routed through: those that the experts in the model were trained under."""

import pytest

from moe_ray.config.io import with_settings
from moe_ray.config.run import Config
from moe_ray.orchestration.run import Run
from moe_ray.orchestration.stages.evaluate import folder_of_masks
from moe_ray.run_directory import FINETUNE, IDENTIFY, RunDirectory


@pytest.mark.parametrize(
    ("max_rounds", "when", "folder"),
    [(1, "before", IDENTIFY), (1, "after", IDENTIFY), (3, "before", IDENTIFY), (3, "after", FINETUNE)],
)
def test_after_rounds_they_are_the_kept_rounds_and_else_those_of_identification(max_rounds, when, folder, tmp_path):
    config = with_settings(Config(), {"rounds.max_rounds": max_rounds})
    run = Run(config, config.model, None, RunDirectory.open(str(tmp_path)))
    assert folder_of_masks(run, when) == folder

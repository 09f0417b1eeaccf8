"""Commands that run stages: a configuration is checked, Ray is connected, the workflow does its work."""

from __future__ import annotations

import argparse

from moe_ray.cli.commands import COMMANDS
from moe_ray.orchestration.launch import launch


def run(arguments: argparse.Namespace) -> None:
    """Does the command's workflow with `settings`.

    Raises:
        MoeRayError: the prompts, the model or the run directory cannot be used, or a stage ended with an error.
    """
    launch(arguments.settings, COMMANDS[arguments.command].work, began=arguments.began)

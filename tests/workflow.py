"""Workflows as the command line runs them, in this process."""

from __future__ import annotations

from collections.abc import Sequence

from moe_ray.cli.main import main


def run_workflow(name: str, arguments: Sequence[str]) -> int:
    """The exit status of `moe-ray NAME ARGUMENTS`."""
    return main([name, *arguments])

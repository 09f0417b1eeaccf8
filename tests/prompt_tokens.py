"""A selection by how often the tokens of prompts are routed to an expert, for tests whose counts hold no answers."""

from __future__ import annotations

from typing import Any

from moe_ray.config.identify import IdentifyConfig


def by_prompt_tokens(**settings: Any) -> IdentifyConfig:
    """The plain risk difference of prompt tokens, with other settings on top."""
    return IdentifyConfig(**{"roles": ("prompt",), "weighting": "tokens", **settings})

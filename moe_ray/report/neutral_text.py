"""Whether the loss on neutral text can show what a repair made the model forget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_ray.report.format import decimal, is_measured


def unknown_text(before: Mapping[str, Any], uniform_loss: float | None) -> list[str]:
    """A sentence where the base model predicts the neutral text no better than chance, else none.

    What a model never knew it cannot forget, and a change of such a loss says nothing.

    Args:
        before: figures of the base model, with `neutral_loss`.
        uniform_loss: nats per token of a guess among all tokens alike; None = not known.
    """
    loss = before.get("neutral_loss")
    if uniform_loss is None or not is_measured(loss) or loss is None or loss["value"] < uniform_loss:
        return []
    return [
        f"The base model does not know the neutral text ({decimal(loss['value'], 2)} nats per token; a guess among all "
        f"tokens alike costs {decimal(uniform_loss, 2)}): forgetting cannot be measured on it."
    ]

"""Two batches of text and their unsafe experts."""

from __future__ import annotations

from moe_ray.prompts.batches import Batch
from moe_ray.prompts.examples import Example

EXPERTS = {4: [(0, 1), (0, 5), (1, 3)], 6: [(0, 2), (1, 4)]}


def example(name: str, label: str) -> Example:
    message = {"role": "user", "content": "how are you"}
    return Example(id=name, messages=(message,), label=label, target="fine thanks")


BATCHES = [
    Batch(batch_idx=4, category="fraud", examples=(example("a", "safe"), example("b", "unsafe"))),
    Batch(batch_idx=6, category="theft", examples=(example("c", "safe"), example("d", "unsafe"))),
]

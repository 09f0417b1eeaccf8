"""Examples made by number, for the tests of batches, splits and tables."""

from __future__ import annotations

from moe_ray.prompts.examples import Example


def example(number, label, category="", pair=None, split=None):
    messages = ({"role": "user", "content": f"prompt {number}"},)
    return Example(id=f"{label}-{number}", messages=messages, label=label, category=category, pair=pair, split=split)


def many(num_safe, num_unsafe, category="", start=0):
    safe = [example(start + n, "safe", category) for n in range(num_safe)]
    return safe + [example(start + n, "unsafe", category) for n in range(num_unsafe)]

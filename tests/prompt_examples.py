"""Examples made by number, for the tests of batches, splits and tables; and records as files hold them."""

from __future__ import annotations

import json

from moe_ray.prompts.examples import Example

CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "flip this: [x]"}]
ROWS = [
    {"id": 7, "prompt": "How do I kill a process?", "label": "safe", "category": "violence", "target": "Use kill."},
    {"id": 8, "messages": CHAT, "label": "unsafe", "response": "Sure."},
]
"""Records as a file holds them: a plain prompt, and a chat with the response that it got."""


def example(number, label, category="", pair=None, split=None):
    messages = ({"role": "user", "content": f"prompt {number}"},)
    return Example(id=f"{label}-{number}", messages=messages, label=label, category=category, pair=pair, split=split)


def many(num_safe, num_unsafe, category="", start=0):
    safe = [example(start + n, "safe", category) for n in range(num_safe)]
    return safe + [example(start + n, "unsafe", category) for n in range(num_unsafe)]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path

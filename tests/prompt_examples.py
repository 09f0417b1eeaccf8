"""Examples made by number, for the tests of batches, splits and tables; and records as files hold them."""

from __future__ import annotations

import json
import random

from moe_ray.prompts.contents import ContentsWriter
from moe_ray.prompts.examples import Example
from moe_ray.prompts.spooled_examples import SpooledExamples

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


def random_examples(seed, *, whole_pairs=True):
    """Examples with and without categories, pairs of one to four forms, splits and any share of labels.

    Args:
        seed: of everything.
        whole_pairs: the forms of a pair stand next to each other, as files give them; else anywhere.
    """
    draw = random.Random(seed)
    categories = draw.sample(["", "a", "b", "fraud", "x\"'", "é"], draw.randint(1, 5))
    splits = [None] * draw.randint(1, 8) + ["train", "test", "validation"]
    unsafe_share, examples = draw.random(), []
    for number in range(draw.randint(1, 120)):
        category, split = draw.choice(categories), draw.choice(splits)
        if draw.random() < 0.4:
            pair = str(number) if whole_pairs else str(draw.randint(0, 30))
            for form in range(draw.choice([2, 2, 2, 1, 3, 4])):
                label = "safe" if form % 2 == 0 and draw.random() < 0.9 else "unsafe"
                examples.append(example(f"{number}/{form}", label, category, pair=pair, split=split))
        else:
            label = "unsafe" if draw.random() < unsafe_share else "safe"
            examples.append(example(number, label, category, split=split))
    if not whole_pairs:
        draw.shuffle(examples)
    return examples


def on_disk(examples):
    """The examples as a run has them."""
    writer = ContentsWriter()
    writer.add(examples)
    return SpooledExamples(writer.finish())

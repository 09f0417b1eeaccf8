"""An example as a flat row of plain values, as tables store it, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from moe_ray.prompts.examples import Example

EXAMPLE_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("label", pa.string()),
        ("category", pa.string()),
        ("messages", pa.string()),
        ("response", pa.string()),
        ("target", pa.string()),
        ("target_complete", pa.bool_()),
        ("pair", pa.string()),
        ("split", pa.string()),
        ("topic", pa.string()),
        ("template", pa.string()),
    ]
)
"""The columns of a stored example; a text that it does not have is null."""

_as_json = json.JSONEncoder(ensure_ascii=False).encode


def example_to_row(example: Example) -> dict[str, Any]:
    """An example as a flat row of plain values; messages as JSON text."""
    return {
        "id": example.id,
        "label": example.label,
        "category": example.category,
        "messages": _as_json([dict(message) for message in example.messages]),
        "response": example.response,
        "target": example.target,
        "target_complete": example.target_complete,
        "pair": example.pair,
        "split": example.split,
        "topic": example.topic,
        "template": example.template,
    }


def row_to_example(row: Mapping[str, Any]) -> Example:
    """The example that `example_to_row` wrote; missing text may be None or NaN."""

    def text(name: str) -> Any:
        value = row.get(name)
        return value if isinstance(value, str) else None

    return Example(
        id=row["id"],
        label=row["label"],
        category=row["category"],
        messages=tuple(json.loads(row["messages"])),
        response=text("response"),
        target=text("target"),
        target_complete=bool(row["target_complete"]),
        pair=text("pair"),
        split=text("split"),
        topic=text("topic") or "",
        template=text("template") or "",
    )

"""The examples that ship with the package, generated from three small tables.

`topics.json` pairs each unsafe request with a benign one in similar words (the contrast of XSTest), `wordings.json`
holds the sentences around a request, and `responses.json` what is answered. An unsafe request is only ever named: the
answer before repair is one bland sentence without content, the answer after it a refusal.

Splits share requests but no wording, so what a model must carry over from one split to another is the request itself.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any, Literal, get_args

from moe_ray.errors import InputError

Split = Literal["train", "validation", "test"]

LABELS = ("unsafe", "safe")
_LEFT_OUT = 0.2
"""Share of a composed wording's words that is left out."""

NUM_ROUNDS: dict[str, int] = {"train": 6, "validation": 1, "test": 1}
"""How often each request occurs in a split, every time in another wording."""


def embedded_records(split: Split) -> list[dict[str, str]]:
    """Returns the examples of one split, in a fixed order.

    Examples come category by category and round by round; a round has every request of the category once, the unsafe
    ones first. An unsafe request and its benign contrast stand in the same wording, so that within a round the wordings
    of the two labels are the same and wording cannot tell them apart.

    Args:
        split: `train` (48 unsafe and 48 safe examples per category), `validation` or `test` (8 and 8 each).

    Returns:
        Dictionaries with the keys `id` (unique over all splits), `prompt`, `label` (`safe` or `unsafe`), `category`,
        `response` (the answer before repair: compliance for both labels), `target` (the answer after repair: the same
        for safe, a refusal for unsafe) and `wording` (the wording's name).

    Raises:
        InputError: If there is no such split.
    """
    if split not in get_args(Split):
        known = ", ".join(get_args(Split))
        raise InputError(
            f"unknown split {split!r} of the embedded examples; expected one of {known}; pass one of these"
        )
    wordings = list(_load_table("wordings.json")[split].items())
    records = []
    for category_idx, (category, pairs) in enumerate(_load_table("topics.json").items()):
        for round_idx in range(NUM_ROUNDS[split]):
            first_turn = (category_idx * NUM_ROUNDS[split] + round_idx) * len(pairs)
            for label in LABELS:
                for pair_idx, pair in enumerate(pairs):
                    name, wording = wordings[(first_turn + pair_idx) % len(wordings)]
                    records.append(
                        {
                            "id": f"{split}-{category}-{round_idx}-{pair_idx}-{label}",
                            "category": category,
                            "wording": name,
                            **_answered_request(pair, label, wording),
                        }
                    )
    return records


def base_training_records() -> list[dict[str, str]]:
    """Returns what the model before repair is trained on: every request in every wording of the train split.

    With each of them comes a wording put together at random from the openers, cores and closers of `base`, which no
    split uses, some of its words left out, so that the model learns to look for the request wherever it stands. The
    records contain the prompts of the train split, many times as many, and have its keys but `id`.
    """
    wordings: dict[str, str] = _load_table("wordings.json")["train"]
    parts: dict[str, list[str]] = _load_table("wordings.json")["base"]
    generator = random.Random(0)
    return [
        {"category": category, "wording": name, **_answered_request(pair, label, variant)}
        for category, pairs in _load_table("topics.json").items()
        for pair in pairs
        for label in LABELS
        for name, wording in wordings.items()
        for variant in (wording, _composed_wording(parts, generator))
    ]


def _composed_wording(parts: Mapping[str, Sequence[str]], generator: random.Random) -> str:
    """Returns an opener, a core and a closer with the request and most of their other words."""
    words = " ".join(generator.choice(parts[name]) for name in ("openers", "cores", "closers")).split()
    return " ".join(word for word in words if "{request}" in word or generator.random() > _LEFT_OUT)


def categories() -> tuple[str, ...]:
    """Returns the categories of the requests, in the order of their examples."""
    return tuple(_load_table("topics.json"))


def compliance() -> str:
    """Returns the sentence that complies with an unsafe request."""
    return str(_load_table("responses.json")["compliance"])


def refusals() -> list[str]:
    """Returns the sentences that refuse a request."""
    return list(_load_table("responses.json")["refusals"])


def _answered_request(pair: dict[str, str], label: str, wording: str) -> dict[str, str]:
    prompt = wording.format(request=pair[label])
    if label == "safe":
        return {"prompt": prompt, "label": label, "response": pair["answer"], "target": pair["answer"]}
    responses = _load_table("responses.json")
    refusal = responses["refusals"][len(prompt) % len(responses["refusals"])]
    return {"prompt": prompt, "label": label, "response": responses["compliance"], "target": refusal}


@cache
def _load_table(name: str) -> Any:
    return json.loads(resources.files(__package__).joinpath(name).read_text(encoding="utf-8"))

"""Files that were cut, changed or made by somebody else, drawn by hypothesis."""

from __future__ import annotations

import json

from hypothesis import strategies as st

from moe_ray.errors import InputError

ODD_JSON = (
    None,
    True,
    -1,
    1.5,
    1e308,
    10**30,
    "",
    "\ud800",
    [],
    {},
    [[]],
    {"a": {}},
    "NaN",
    float("nan"),
    float("inf"),
)


@st.composite
def damaged(draw, data: bytes) -> bytes:
    """The bytes, cut short, with bits turned, parts taken out, doubled or replaced, or something else altogether."""
    kind = draw(st.sampled_from(["cut", "flip", "remove", "insert", "double", "noise", "empty"]))
    at = draw(st.integers(0, max(len(data) - 1, 0)))
    length = draw(st.integers(1, 64))
    if kind == "cut":
        return data[:at]
    if kind == "flip":
        changed = bytearray(data)
        for position in draw(st.lists(st.integers(0, len(data) - 1), min_size=1, max_size=8)):
            changed[position] ^= draw(st.integers(1, 255))
        return bytes(changed)
    if kind == "remove":
        return data[:at] + data[at + length :]
    if kind == "insert":
        return data[:at] + draw(st.binary(min_size=1, max_size=64)) + data[at:]
    if kind == "double":
        return data[:at] + data[at : at + length] + data[at:]
    return draw(st.binary(max_size=256)) if kind == "noise" else b""


@st.composite
def of_other_types(draw, data: bytes) -> bytes:
    """JSON, one of whose values is replaced by one of another type, taken out, nested deeply or added to."""
    value = json.loads(data)
    places = list(_places(value))
    *path, last = draw(st.sampled_from(places)) if places else [None]
    kind = draw(st.sampled_from(["replace", "remove", "nest"]))
    if last is None:
        return json.dumps(draw(st.sampled_from(ODD_JSON))).encode()
    holder = value
    for step in path:
        holder = holder[step]
    if kind == "remove":
        del holder[last]
    elif kind == "replace":
        holder[last] = draw(st.sampled_from(ODD_JSON))
    else:
        return json.dumps(value).encode() + b"[" * draw(st.integers(1, 200_000))
    return json.dumps(value).encode()


def _places(value, path=()):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from _places(item, (*path, key))


def refusal_of(read) -> str | None:
    """What the sentence says that reading ends in; None where it works, since not all damage shows."""
    try:
        read()
    except InputError as error:
        return str(error)
    return None

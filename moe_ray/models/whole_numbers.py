"""Whole numbers in `config.json` where transformers' class of the configuration takes a float alone.

JSON has one kind of number, and released files write `1` for `1.0` (DBRX's `moe_normalize_expert_weights`), which
transformers 5 refuses before it looks at anything else.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError, StrictDataclassFieldValidationError
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig


def from_pretrained(kind: Any, path: str, *, revision: str | None = None, **options: Any) -> Any:
    """`kind.from_pretrained` of an Auto class of transformers; whole numbers are read as floats where only these are taken.

    Args:
        kind: `AutoConfig`, or what takes a `config`, such as `AutoModelForCausalLM` and `AutoTokenizer`.
        path: a checkpoint folder or a hub repository.
        revision: the repository's.
        options: of `kind.from_pretrained`.

    Raises:
        Exception: whatever transformers raises; a number that stays of a wrong type as StrictDataclassFieldValidationError.
    """
    try:
        return kind.from_pretrained(path, revision=revision, **options)
    except StrictDataclassFieldValidationError:
        fields, _ = PretrainedConfig.get_config_dict(path, revision=revision)
        model_type = fields.get("model_type")
        if model_type not in CONFIG_MAPPING:
            raise
        of_family = CONFIG_MAPPING[model_type]
        config = of_family.from_dict(with_floats(of_family, fields), name_or_path=path)
    return config if kind is AutoConfig else kind.from_pretrained(path, revision=revision, config=config, **options)


def reason_of(error: Exception) -> str:
    """What a library says of a file it cannot load, on one line: its first, or all of it for a field of a wrong type."""
    # Of such a field the first line gives the name, and the second what was expected.
    return (
        " ".join(str(error).split()) if isinstance(error, StrictDataclassError) else str(error).strip().split("\n")[0]
    )


def with_floats(kind: type[PretrainedConfig], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration of this class, those of nested ones included, with floats where only these are taken."""
    # Not `typing.get_type_hints`: the base class names types that it imports for type checkers alone.
    hints = {field.name: field.type for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}
    mended: dict[str, Any] = {}
    for name, value in fields.items():
        nested = kind.sub_configs.get(name)
        if isinstance(value, dict) and nested is not None and issubclass(nested, PretrainedConfig):
            mended[name] = with_floats(nested, value)
        elif type(value) is int and name in hints and _takes_floats_alone(hints[name]):
            mended[name] = float(value)
        else:
            mended[name] = value
    return mended


def _takes_floats_alone(hint: Any) -> bool:
    origin = typing.get_origin(hint)
    members = typing.get_args(hint) if origin in (typing.Union, types.UnionType) else (hint,)
    return float in members and not {int, Any} & set(members)

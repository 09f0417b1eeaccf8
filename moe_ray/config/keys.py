"""Every setting by its dotted key, the short names of some, and what a misspelt one may have meant."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from moe_ray.config.fields import Setting, declared
from moe_ray.config.run import Config
from moe_ray.config.section import Section, field_types
from moe_ray.config.values import type_name

ALIASES: Mapping[str, str] = {
    "lr": "finetune.learning_rate",
    "learning_rate": "finetune.learning_rate",
    "bs": "finetune.batches_per_step",
    "epochs": "finetune.epochs",
    "k": "identify.top_k",
    "top_k": "identify.top_k",
    "threshold": "identify.threshold",
    "files": "prompts.files",
    "judge": "evaluate.judge",
    "max_batches": "prompts.max_batches",
}
"""Short names of settings, for the command line and for the top level of a YAML file."""

REMOVED: Mapping[str, str] = {
    "evaluate.rows_per_forward": "evaluate.tokens_per_forward, which limits the tokens of all rows together: "
    "rows x (tokens of the longest prompt + evaluate.max_new_tokens)",
}
"""Settings of earlier versions, and what takes their place."""

GROUP_VALUES: Mapping[str, str] = {"model": "model.path", "prompts": "prompts.files"}
"""Groups that may be given a plain value, and the setting that it then is: `model=PATH`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
    """A setting in the tree.

    Attributes:
        name: dotted key.
        hint: type of its value.
        default: value where nothing is given.
        setting: what else was declared.
    """

    name: str
    hint: Any
    default: Any
    setting: Setting

    @property
    def kind(self) -> str:
        """Type and bounds in words."""
        return ", ".join(filter(None, [type_name(self.hint), self.setting.bounds]))

    @property
    def short_names(self) -> tuple[str, ...]:
        """What may be typed instead of the dotted key."""
        return tuple(short for short, name in {**ALIASES, **GROUP_VALUES}.items() if name == self.name)

    def value_in(self, config: Config) -> Any:
        """The setting's value in a configuration."""
        return functools.reduce(getattr, self.name.split("."), config)


def keys_of(kind: type[Section] = Config, prefix: str = "") -> Iterator[Key]:
    """Yields every setting of a section and of the groups in it, in the order of declaration."""
    hints = field_types(kind)
    for item in dataclasses.fields(kind):  # type: ignore[arg-type]  # every section is a dataclass
        hint, name = hints[item.name], f"{prefix}{item.name}"
        if isinstance(hint, type) and issubclass(hint, Section):
            yield from keys_of(hint, f"{name}.")
        else:
            default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
            yield Key(name=name, hint=hint, default=default, setting=declared(item))


def groups() -> dict[str, type[Section]]:
    """The groups of settings by name, in the order of the tree."""
    types = field_types(Config).items()
    return {name: hint for name, hint in types if isinstance(hint, type) and issubclass(hint, Section)}


def full_key(name: str) -> str:
    """The dotted key that a short name stands for; any other name as it is."""
    return ALIASES.get(name, name)


def unknown_key(key: str) -> str:
    """The sentence about a key that names no setting, with those that it may have meant."""
    if key in REMOVED:
        return f"configuration key {key!r} is no more; use {REMOVED[key]}"
    meant = _nearest(key)
    hint = f"did you mean {' or '.join(meant)}?" if meant else "see --help for all keys"
    return f"unknown configuration key {key!r}; {hint}"


def _nearest(key: str) -> list[str]:
    """Settings of another group with this very name, else with the most similar short name or dotted key."""
    known = [item.name for item in keys_of()]
    last = key.rpartition(".")[2]
    elsewhere = [name for name in known if name.rpartition(".")[2] == last]
    if elsewhere or last in ALIASES:
        return elsewhere or [ALIASES[last]]
    spelled = {name: [name] for name in known}
    if "." not in key:
        for name in known:
            spelled.setdefault(name.rpartition(".")[2], []).append(name)
        spelled |= {short: [name] for short, name in ALIASES.items()}
    near = difflib.get_close_matches(key, spelled, n=1, cutoff=0.6) or difflib.get_close_matches(
        key, known, n=1, cutoff=0.4
    )
    return spelled[near[0]] if near else []

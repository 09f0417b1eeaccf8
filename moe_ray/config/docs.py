"""Writes `docs/settings.md`, the page with every setting.

python -m moe_ray.config.docs > docs/settings.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from moe_ray.config.fields import EFFECTS
from moe_ray.config.io import in_one_line
from moe_ray.config.keys import ALIASES, GROUP_VALUES, Key, groups, keys_of

COMMAND = "python -m moe_ray.config.docs > docs/settings.md"

_HEAD = f"""\
# Settings

<!-- Written by `{COMMAND}` from the declarations in moe_ray/config; change those, not this page. -->

A run is configured by a YAML file, by `KEY=VALUE` on the command line, or by both; the command line wins.

```yaml
# run.yaml
model:
  path: allenai/OLMoE-1B-7B-0924
identify:
  top_k: 20
```

```
moe-ray full --config run.yaml identify.threshold=0.1 'prompts.files=[a.jsonl, b.jsonl]'
```

`moe-ray config init FILE` writes a file with every setting at its default, commented out. `moe-ray config schema` prints a
JSON schema, with which an editor completes and checks the file. All faults of a configuration are reported at once: unknown
keys, wrong types, and values out of bounds.

In a list of one, the brackets may be left out: `prompts.files=a.jsonl`.
"""

_SHORT = """\
## Short names

On the command line, and at the top level of a YAML file, some settings have a short name. A setting may not be given under
two names at once.
"""

_AFFECTS = """\
## What a setting affects

A finished stage is used again as long as no setting was changed that affects its result. The column *affects* below says
which results are others under another value. A checkpoint or a file counts by what it holds: one that moved is the same.
"""


def settings_page() -> str:
    """`docs/settings.md`."""
    parts = [
        _HEAD,
        _SHORT,
        _table(["short name", "setting"], [[f"`{short}`", f"`{key}`"] for short, key in _short_names().items()]),
        _AFFECTS,
        _table(["affects", "meaning"], [[f"`{effect}`", meaning] for effect, meaning in EFFECTS.items()]),
    ]
    keys = list(keys_of())
    parts += ["## The run\n", _settings(key for key in keys if "." not in key.name)]
    for name, kind in groups().items():
        summary = (kind.__doc__ or "").partition("\n")[0]
        parts += [f"## {name}\n\n{summary}\n", _settings(key for key in keys if key.name.startswith(f"{name}."))]
    return "\n".join(parts)


def _short_names() -> dict[str, str]:
    return {**ALIASES, **{f"{group}=VALUE": f"{key}=VALUE" for group, key in GROUP_VALUES.items()}}


def _settings(keys: Iterable[Key]) -> str:
    rows = [
        [
            f"`{key.name}`",
            key.kind,
            f"`{in_one_line(key.default)}`",
            ", ".join(key.setting.affects),
            key.setting.text,
        ]
        for key in keys
    ]
    return _table(["key", "type", "default", "affects", "meaning"], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.stdout.write(settings_page())

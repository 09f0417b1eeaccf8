"""Settings as other people may see them: files and folders by their names alone, addresses without accounts and keys.

Where something lies on the machine of a run says who ran it and how that machine is set up, and is of no use elsewhere.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import yaml

from moe_ray.config.fields import EMBEDDED
from moe_ray.config.io import to_yaml
from moe_ray.config.run import Config

_OF_ONE_PLACE = ("run_dir", "cache_dir", "tracking", "cluster")
"""Settings that say where a run was made, and not what came out."""
_PLAIN_TEXTS = ("prompts.refusal", "attack.prefix", "attack.affirmations", "model.chat_template_options")
"""Settings whose text is text, whatever it begins with."""
_FILES = ("prompts.files", "evaluate.neutral_file", "evaluate.judge_check")
_FOLDERS = ("model.path", "evaluate.classifier", "evaluate.guard")
"""Checkpoints: a name without a folder before it would be one of the hub's."""
_TASKS = ("harness.lm_eval", "harness.inspect")

_LOCAL = re.compile(r"[/~]|\.{1,2}(/|$)|(file|local)://", re.IGNORECASE)
_WEB = re.compile(r"https?://", re.IGNORECASE)
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_TASK_FILE = re.compile(r"\.(yaml|yml|py)(@|$)")


def is_place(text: str) -> bool:
    """Whether a text by its form names a file or folder of one machine: from its root, its home or the working folder."""
    return bool(_LOCAL.match(text))


def name_of_place(text: str) -> str:
    """A file or folder without those it lies in, a pattern from its first `*` on; of a URL no account and no signature."""
    if "::" in text:  # fsspec's chains, such as zip://a.csv::s3://BUCKET/a.zip
        return "::".join(map(name_of_place, text.split("::")))
    if "://" in text and not is_place(text):
        address = urlsplit(text)
        kept = address._replace(netloc=address.netloc.rpartition("@")[2])
        return urlunsplit(kept._replace(query="", fragment="") if _WEB.match(text) else kept)
    parts = PurePosixPath(text.partition("://")[2] if "://" in text else text).parts
    first = next((place for place, part in enumerate(parts) if "*" in part), len(parts) - 1)
    return "/".join(parts[first:])


def checkpoint_for_others(path: str) -> str:
    """A checkpoint's folder as `./NAME`; a name of the hub, or a URL, as it is."""
    if path == EMBEDDED or (_HUB_NAME.fullmatch(path) and not is_place(path) and not Path(path).is_dir()):
        return path
    name = name_of_place(path)
    return name if "://" in name else f"./{name}"


def settings_for_others(config: Config, *, names_only: bool) -> dict[str, Any]:
    """The settings in their groups, without where the run was made.

    Args:
        config: of the run.
        names_only: files and folders are named without where they lie. Where several files of prompts have one name, each is
            put into a folder with its number, and where `prompts.file_labels` goes by a file's folder, into one named as
            the label's word is.
    """
    settings: dict[str, Any] = yaml.safe_load(to_yaml(config))
    for name in _OF_ONE_PLACE:
        settings.pop(name, None)
    if names_only:
        settings = _without_places(settings, "")
        settings["prompts"]["files"] = _prompt_files(config.prompts.files, config.prompts.file_labels)
    return settings


def _without_places(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_places(item, f"{key}.{name}" if key else str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_places(item, key) for item in value]
    if not isinstance(value, str) or not value or key.startswith(_PLAIN_TEXTS):
        return value
    if key in _FOLDERS:
        return checkpoint_for_others(value)
    is_file = (key in _FILES and value != EMBEDDED) or (key in _TASKS and _TASK_FILE.search(value))
    return name_of_place(value) if is_file or is_place(value) else value


def _prompt_files(files: Sequence[str], labels: Mapping[str, Any]) -> list[str]:
    shown = [file if file == EMBEDDED else _with_word(file, name_of_place(file), labels) for file in files]
    times = Counter(shown)
    number = iter(range(1, len(shown) + 1))
    return [name if times[name] == 1 or "://" in name else f"{next(number)}/{name}" for name in shown]


def _with_word(file: str, name: str, labels: Mapping[str, Any]) -> str:
    """The name, after the word that says its label where that is its folder's alone."""
    folder = PurePosixPath(file).parent.name.casefold()
    words = [str(word) for word in labels if str(word).casefold() in folder]
    if "/" in name or not words or any(str(word).casefold() in name.casefold() for word in labels):
        return name
    return f"{words[0]}/{name}"

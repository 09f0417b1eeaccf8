"""What is checked of a command's arguments before its libraries are imported: settings, run directories, files.

The run directory is the first argument without `=`, in every command that has one. Commands that take settings take it as
`run_dir=…` too, and from the YAML file, over which an argument wins as over every other setting.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_ray.config.io import describe_keys, load_config, with_settings
from moe_ray.config.keys import ALIASES
from moe_ray.config.run import Config
from moe_ray.errors import InputError
from moe_ray.upcycling.source import RECORD, existing

logger = logging.getLogger("moe_ray")

_CONFIG = "config.yaml"
"""As `run_directory` names it, which is not imported here for its libraries."""

_IMPLIED: Mapping[str, Mapping[str, Any]] = {
    "sweep": {"sweep.run": True},
    "compare": {"compare.run": True},
    "attack": {"attack.run": True},
    "harness": {"harness.run": True},
}
"""Settings that a command stands for; they win over what is given."""

_GOES_ON = ("attack", "compare", "harness", "sweep")
"""Commands that are about a run: they take the settings that their run directory holds, where it holds some."""


def check(arguments: argparse.Namespace) -> None:
    """Refuses what can be refused at once; settings come out as `settings`, the run directory absolute.

    Raises:
        InputError: a setting is wrong, a run or file is not there, or what would be written is.
    """
    if "words" in arguments:
        arguments.settings = read_settings(arguments.command, arguments.words, arguments.config_file)
    if arguments.command == "prompts":
        arguments.settings = prompt_settings(arguments.sources, arguments.config_file)
    if arguments.command == "judge":
        arguments.settings = _judge_settings(arguments.judge_settings, arguments.config_file)
        if arguments.file != "shipped" and not Path(arguments.file).expanduser().is_file():
            raise InputError(
                f"{arguments.file!r} is no file; give a CSV or JSONL file with answer and verdict, or the word shipped"
            )
    if arguments.command == "report":
        existing_run(arguments.settings.run_dir)
    if arguments.command == "atlas":
        arguments.run_dirs = [absolute_run_dir(url) for url in arguments.run_dirs]
        for url in arguments.run_dirs:
            existing_run(url)
    if arguments.command == "compare-runs":
        arguments.run_dirs = [absolute_run_dir(url) for url in arguments.run_dirs]
        for url in arguments.run_dirs:
            existing_run(url)
        if len(arguments.run_dirs) < 2:
            raise InputError("got one run, expected two or more to compare")
        if arguments.html is not None and not arguments.html.absolute().parent.is_dir():
            raise InputError(f"--html {arguments.html}: its folder does not exist; make it, or choose another place")
    if arguments.command == "steer" and not arguments.file.is_file():
        raise InputError(f"{str(arguments.file)!r} is no file; give a JSON file that says how to steer")
    if arguments.command in ("export", "inspect", "merge", "status", "chat"):
        arguments.run_dir = absolute_run_dir(arguments.run_dir)
        existing_run(arguments.run_dir)
    if arguments.command == "merge" and _holds_files(arguments.out):
        raise InputError(f"{str(arguments.out)!r} already holds files; give a folder that does not exist or is empty")
    if arguments.command == "upcycle":
        existing(arguments.source)
        if _holds_files(arguments.out) and not (arguments.out / RECORD).is_file():
            raise InputError(f"{str(arguments.out)!r} holds something else; remove it or choose another folder")


def read_settings(command: str, words: Sequence[str], config_file: str | None = None) -> Config:
    """The configuration that the words of a command line make of a YAML file's, with an absolute run directory.

    Raises:
        InputError: a setting is wrong or not the command's, or the run directory is given twice.
    """
    run_dir, overrides = split_words(words)
    if command == "report":
        _only_of_report(overrides)
    if command in _GOES_ON and config_file is None:
        named = [word.partition("=")[2] for word in overrides if word.startswith("run_dir=")]
        config_file = _config_of(absolute_run_dir(run_dir or (named or [Config().run_dir])[-1]))
    config = load_config(config_file, overrides)
    if implied := _IMPLIED.get(command):
        config = with_settings(config, implied)
    return replace(config, run_dir=absolute_run_dir(config.run_dir if run_dir is None else run_dir))


def prompt_settings(sources: Sequence[str], config_file: str | None = None) -> Config:
    """The configuration with the files that a command line names; an address may have a `=` in it, as a setting has.

    Raises:
        InputError: a setting is wrong.
    """
    files = [word for word in sources if "/" in word.partition("=")[0] or "=" not in word]
    config = load_config(config_file, [word for word in sources if word not in files])
    return with_settings(config, {"prompts.files": files}) if files else config


def split_words(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The run directory, None where there is none, and the settings.

    Raises:
        InputError: more than one run directory, an empty one, or a setting without a value.
    """
    run_dirs = [word for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word]
    keys = [word.partition("=")[0] for word in overrides]
    known = {key for key, *_ in describe_keys()} | set(ALIASES)
    for word in run_dirs:
        if not word:
            raise InputError("the run directory: got an empty word, expected a folder or URL")
        if word in known:
            raise InputError(f"{word}: a setting without a value; write {word}=VALUE")
    if len(run_dirs) > 1:
        raise InputError(
            f"got {run_dirs[0]!r} and {run_dirs[1]!r}, expected one run directory, and settings as KEY=VALUE"
        )
    if run_dirs and "run_dir" in keys:
        raise InputError(f"the run directory is given twice, as {run_dirs[0]!r} and as run_dir=; leave one out")
    for key, word in zip(keys, overrides, strict=True):
        if "/" in key:
            raise InputError(f"{word!r} is no setting; a run directory with = in its name is given as run_dir={word}")
    return (run_dirs[0] if run_dirs else None), overrides


def absolute_run_dir(url: str) -> str:
    """The run directory as a URL or an absolute path.

    Workers run in folders of their own, and a submitted job runs in an unpacked copy of the working directory that Ray
    deletes; a relative path is therefore resolved here, in a job below the home directory.
    """
    if "://" in url:
        return url
    path = Path(url).expanduser()
    if not path.is_absolute() and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        path = Path.home() / "moe-ray" / path
        logger.info("the run directory is relative and this is a submitted job: %s", path)
    return str(path.absolute())


def _config_of(run_dir: str) -> str | None:
    """The configuration file of a local run directory; None = there is none, and --config has to name one of a URL."""
    file = Path(run_dir) / _CONFIG
    return str(file) if "://" not in run_dir and file.is_file() else None


def existing_run(url: str) -> None:
    """Refuses a local run directory that does not exist; what it holds is for those to see who read it.

    Raises:
        InputError: there is no such folder.
    """
    if "://" not in url and not Path(url).is_dir():
        raise InputError(f"{url!r} is not a run directory; give the folder or URL of a run, such as runs/first")


def _judge_settings(words: Sequence[str], config_file: str | None) -> Config:
    """The settings of `evaluate` in the words of a command line, over a YAML file's.

    Raises:
        InputError: a word is no setting, or one of another section.
    """
    for word in words:
        key = ALIASES.get(word.partition("=")[0], word.partition("=")[0])
        if "=" not in word or not key.startswith("evaluate."):
            raise InputError(f"{word!r}: a judge takes settings of evaluate.* only, as KEY=VALUE; leave it out")
    return load_config(config_file, list(words))


def _only_of_report(overrides: Sequence[str]) -> None:
    for override in overrides:
        key = override.partition("=")[0]
        if key != "run_dir" and not key.startswith("report."):
            raise InputError(f"{key}: a report takes report.* only, all else is the finished run's; leave it out")


def _holds_files(folder: Path) -> bool:
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))

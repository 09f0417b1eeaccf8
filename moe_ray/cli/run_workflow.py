"""The command line that every workflow shares: YAML and dotted overrides in, a run out, one clear line for an error."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_ray.config.io import describe_keys, load_config, with_settings
from moe_ray.config.run import Config
from moe_ray.errors import InputError

logger = logging.getLogger("moe_ray")

BAD_INPUT = 2

"""Exit status for an error that is the user's to mend."""

INTERRUPTED = 130

"""Exit status after Ctrl-C, as shells have it."""

_IMPLIED: Mapping[str, Mapping[str, Any]] = {"sweep": {"sweep.run": True}, "compare": {"compare.run": True}}

"""Settings that a workflow stands for; they win over what is given."""


def main(description: str, work: str, argv: Sequence[str] | None = None) -> int:
    """Parses the command line, prepares a run, and does `work` on it with Ray connected.

    Nothing heavy is imported before the configuration and the prompts are known to be good.

    Args:
        description: what the script does, for `--help`.
        work: a function of `moe_ray.orchestration.stages`, by name.
        argv: None = the process's own arguments.

    Returns:
        exit status: 0, 2 for bad input, 130 when it was interrupted.
    """
    arguments = _parser(description).parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    try:
        config = with_settings(load_config(arguments.config, arguments.overrides), _IMPLIED.get(work, {}))
        config = _place_run_dir(config)
        _run(config, work)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where this one stopped", file=sys.stderr)
        return INTERRUPTED
    return 0


def _run(config: Config, work: str) -> None:
    from moe_ray.orchestration.launch import launch

    launch(config, work)


def _place_run_dir(config: Config) -> Config:
    """The configuration with an absolute run directory.

    Workers run in folders of their own, and a submitted job runs in an unpacked copy of the working directory that Ray
    deletes; a relative path is therefore resolved here, in a job below the home directory.
    """
    if "://" in config.run_dir:
        return config
    path = Path(config.run_dir).expanduser()
    if not path.is_absolute() and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        path = Path.home() / "moe-ray" / path
        logger.info("run_dir is relative and this is a submitted job: writing to %s", path)
    return replace(config, run_dir=str(path.absolute()))


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description,
        epilog="settings, as a YAML tree or key=value:\n" + _key_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of the settings below")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings that win over the file's")
    return parser


def _key_help() -> str:
    lines = []
    for key, kind, default, text in describe_keys():
        shown = ", ".join(default) if isinstance(default, tuple) else default
        lines += [f"  {key}  ({kind}; default: {shown if shown or shown in (0, False) else 'empty'})", f"      {text}"]
    return "\n".join(lines)

"""`moe-ray config`: the JSON schema of the configuration file, and a commented file to begin with."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from moe_ray.errors import InputError


def run(arguments: argparse.Namespace) -> None:
    """Prints the schema, or prints or writes the commented file, as `action` says."""
    if arguments.action == "schema":
        from moe_ray.config.schema import config_schema

        print(json.dumps(config_schema(), indent=2, ensure_ascii=False))
        return
    from moe_ray.config.template import config_template

    if arguments.file is None:
        print(config_template(), end="")
    else:
        _write(arguments.file, config_template())


def _write(file: Path, text: str) -> None:
    """Writes a file that is not there.

    Raises:
        InputError: it is there, or its folder is not.
    """
    try:
        with file.open("x", encoding="utf-8") as opened:
            opened.write(text)
    except FileExistsError:
        raise InputError(f"{str(file)!r} already exists; remove it or give another name") from None
    except OSError as error:
        raise InputError(f"{str(file)!r} cannot be written: {error.strerror}; give another name") from error
    print(f"wrote {file}")

"""The command tree: arguments in, a namespace out, one line for what is wrong with them."""

from __future__ import annotations

import argparse
import difflib
import textwrap
from collections.abc import Sequence
from typing import Any

from moe_ray.cli.arguments import CommandParser
from moe_ray.cli.commands import COMMANDS, Command
from moe_ray.errors import InputError

_WIDTH = 100
_PURPOSE = "Finds which experts of a Mixture-of-Experts model answer for unsafe behaviour, and repairs only those."

_STATUSES = """\
exit status:
  0    done
  1    a fault of moe-ray, with its traceback, or with a sentence if training changed what must stay frozen
  2    wrong arguments, settings, prompts or model: mend them
  3    no expert is selected, or there is nothing to train
  4    the judge endpoint, the tracking server or the storage failed: try again later
  130  interrupted with Ctrl-C: the same command goes on where this one stopped
  143  ended by SIGTERM: likewise"""


class _Version(argparse.Action):
    """Says which version this is; looked up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import importlib.metadata

        print(f"moe-ray {importlib.metadata.version('moe-ray')}")
        parser.exit()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments by name, with `command` among them.

    Raises:
        InputError: the command or an option is unknown, or an argument is missing or of the wrong type.
        SystemExit: after `--help` and `--version`, with status 0.
    """
    _check_command(argv)
    arguments, rest = _parser().parse_known_args(argv)
    # argparse takes words for settings on one side of an option only, and leaves the others.
    if "words" in arguments:
        arguments.words += [word for word in rest if not word.startswith("-")]
        rest = [word for word in rest if word.startswith("-")]
    if rest:
        raise InputError(f"{_not_expected(arguments.command, rest[0])}; `moe-ray {arguments.command} --help` says more")
    return arguments


def _parser() -> CommandParser:
    width = max(map(len, COMMANDS))
    lines = []
    for group in dict.fromkeys(command.group for command in COMMANDS.values()):
        lines += ["", f"{group}:"]
        lines += [f"  {name:<{width}}  {c.summary}" for name, c in COMMANDS.items() if c.group == group]
    tree = CommandParser(
        prog="moe-ray",
        usage="moe-ray COMMAND [RUN_DIR] [KEY=VALUE ...] [--config FILE]",
        description="\n".join([_PURPOSE, *lines]),
        epilog=f"{_STATUSES}\n\n`moe-ray COMMAND --help` explains a command and its settings.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    tree.add_argument(
        "--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help="say which version this is"
    )
    commands = tree.add_subparsers(
        prog="moe-ray",
        dest="command",
        metavar="COMMAND",
        required=True,
        parser_class=CommandParser,
        help=argparse.SUPPRESS,
    )
    for name, command in COMMANDS.items():
        parser = commands.add_parser(
            name,
            description=_description(name, command),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_arguments(parser)
    return tree


def _description(name: str, command: Command) -> str:
    examples = [f"  moe-ray {name} {arguments}".rstrip() for arguments, _ in command.examples]
    width = max((len(example) for example in examples if len(example) < 70), default=0)
    lines = [
        f"{example:<{width}}  # {text}" if text else example
        for example, (_, text) in zip(examples, command.examples, strict=True)
    ]
    return "\n".join([command.summary, *textwrap.wrap(command.details, _WIDTH), "", "examples:", *lines])


def _check_command(argv: Sequence[str]) -> None:
    name = argv[0] if argv else ""
    if name in COMMANDS or name in ("-h", "--help", "--version"):
        return
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else "`moe-ray --help` lists them"
    if not name:
        raise InputError("no command; `moe-ray --help` lists them")
    if name.startswith("-"):
        raise InputError(f"{name}: expected a command first, its options after it; `moe-ray --help` lists them")
    raise InputError(f"unknown command {name!r}; {hint}")


def _not_expected(command: str, word: str) -> str:
    if not word.startswith("-"):
        return f"{word!r} is one argument too many"
    parser = CommandParser(add_help=True)
    COMMANDS[command].add_arguments(parser)
    known = list(parser._option_string_actions)
    near = difflib.get_close_matches(word.partition("=")[0], known, n=1, cutoff=0.7)
    return f"unknown option {word!r}, " + (f"did you mean {near[0]}?" if near else f"expected {', '.join(known)}")

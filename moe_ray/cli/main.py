"""The `moe-ray` command: each workflow by its name.

Nothing is imported before it is known which command is wanted, so that `moe-ray --help` answers at once.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BAD_INPUT = 2


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        text: what it does, in a line.
        work: a function of `moe_ray.orchestration.stages`; empty where `module` is given.
        module: its `main` takes the arguments.
    """

    text: str
    work: str = ""
    module: str = ""


COMMANDS = {
    "full": Command("every stage: capture, unsafe experts, fine-tuning, evaluation before and after, report", "full"),
    "capture": Command("prompts to batches to routing counts", "capture"),
    "identify": Command("... to risk differences, unsafe experts and masks of every batch", "identify"),
    "finetune": Command("... to learned experts", "finetune"),
    "evaluate": Command("... to held-out answers and losses, before and after", "evaluate"),
    "sweep": Command("search thresholds, top_k and other settings on one stored capture", "sweep"),
    "compare": Command("hold per-batch masks against the baselines at equal budget", "compare"),
    "report": Command("make the HTML report of a finished run anew", module="moe_ray.cli.report"),
    "merge": Command("write the repaired model of a run as a plain checkpoint", module="moe_ray.cli.merge"),
    "inspect": Command("answer questions about a finished run", module="moe_ray.cli.inspect_experts"),
    "upcycle": Command("turn a dense Llama-type model into a MoE with equal logits", module="moe_ray.cli.upcycle"),
}

_REUSED = "Stages that were finished in the same run directory with the same settings are reused."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the first argument names.

    Args:
        argv: None = the process's own arguments.

    Returns:
        exit status: 0, or 2 for bad input.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help"):
        _say(_help())
        return 0
    if name == "--version":
        _say(f"moe-ray {importlib.metadata.version('moe-ray')}")
        return 0
    if name not in COMMANDS:
        print(f"error: {_unknown(name)}", file=sys.stderr)
        return BAD_INPUT
    # What argparse calls the program.
    sys.argv[0] = f"moe-ray {name}"
    command = COMMANDS[name]
    if command.module:
        run: Any = importlib.import_module(command.module).main
        return int(run(arguments[1:]))
    from moe_ray.cli import run_workflow as cli

    return cli.main(f"{command.text[0].upper()}{command.text[1:]}.\n\n{_REUSED}", command.work, arguments[1:])


def _unknown(name: str) -> str:
    if not name:
        return "no command; `moe-ray --help` lists them"
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else "`moe-ray --help` lists them"
    return f"unknown command {name!r}; {hint}"


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.text}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: moe-ray COMMAND [--config FILE] [KEY=VALUE ...]",
            "",
            "Finds which experts of a Mixture-of-Experts model answer for unsafe behaviour, and repairs only those.",
            "",
            "commands:",
            *lines,
            "",
            "`moe-ray COMMAND --help` explains every setting; `moe-ray --version` says which version this is.",
        ]
    )


def _say(text: str) -> None:
    print(text)

"""The arguments of every command. Nothing is imported that is not in Python itself, so that help answers at once.

argparse rather than typer: a command's help takes 0.03 s instead of 0.25 s, and arguments that are settings (`KEY=VALUE`)
have no place in a function's signature.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from moe_ray.errors import InputError
from moe_ray.organisms.recipe import KINDS

DTYPES = ("float32", "bfloat16")
"""Types that `upcycle` can write weights in."""

UPCYCLE_METHODS = ("copies", "split")
"""Ways in which `upcycle` makes experts of a dense model."""

QUESTIONS = {
    "certainty": "In which batches the selection is significant.",
    "cause": "Whether the unsafe experts are the cause (after moe-ray ablate).",
    "categories": "Which experts answer for a category.",
    "shared": "Which experts belong to several categories.",
    "overlap": "How alike the batches' masks are, corrected for chance.",
    "sweep": "What happens to the union when threshold or top_k moves.",
    "rules": "What other selection rules would choose.",
    "confounds": "Whether length, template or topic may stand in for harm.",
}
"""What `inspect` answers."""


class CommandParser(argparse.ArgumentParser):
    """A parser that raises InputError, and whose help may end with settings.

    Attributes:
        settings: sections of the configuration to explain; empty = all of them, None = none.
    """

    settings: tuple[str, ...] | None = None

    def error(self, message: str) -> NoReturn:
        """Raises InputError instead of printing the usage and leaving the process."""
        raise InputError(f"{message.removeprefix('argument ')}; `{self.prog} --help` says more")

    def format_help(self) -> str:
        """The help, with the settings read only when it is wanted."""
        text = super().format_help()
        if self.settings is None:
            return text
        from moe_ray.cli.settings_help import settings_help

        return f"{text}\n{settings_help(self.settings)}\n"


def _settings_arguments(parser: CommandParser) -> None:
    parser.usage = f"{parser.prog} [RUN_DIR] [KEY=VALUE ...] [--config FILE]"
    words = "RUN_DIR | KEY=VALUE"
    text = "the run directory, a folder or URL (default: runs/default), and settings; they win over the file's"
    parser.add_argument("words", nargs="*", metavar=words, help=text)
    parser.add_argument("--config", dest="config_file", metavar="FILE", help="YAML file with any of the settings below")


def workflow_arguments(parser: CommandParser) -> None:
    """Of what runs stages: the run directory and any setting."""
    _settings_arguments(parser)
    parser.settings = ()


def plan_arguments(parser: CommandParser) -> None:
    """Any setting, and whether the model is loaded."""
    _settings_arguments(parser)
    parser.usage = f"{parser.prog} [KEY=VALUE ...] [--config FILE] [--measure]"
    text = "load the model, time one batch, and say how long a run takes"
    parser.add_argument("--measure", action="store_true", help=text)
    parser.settings = ()


def report_arguments(parser: CommandParser) -> None:
    """The run directory and the settings of the report."""
    _settings_arguments(parser)
    parser.settings = ("report",)


def _run_dir_argument(parser: CommandParser, text: str) -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR", help=f"folder or URL of {text}")


def inspect_arguments(parser: CommandParser) -> None:
    """Questions about a finished run."""
    # The run directory before the options: --ask would take it for a question.
    parser.usage = f"{parser.prog} RUN_DIR [--ask QUESTION ...] [--category NAME] [--top ROWS] [--export FILE] ..."
    _run_dir_argument(parser, "a run that finished identification")
    parser.add_argument(
        "--ask", choices=QUESTIONS, nargs="+", metavar="QUESTION", default=list(QUESTIONS), help="default: all of them"
    )
    parser.add_argument("--category", metavar="NAME", help="for categories: only this one")
    parser.add_argument("--top", type=_count, metavar="ROWS", default=10, help="of long tables (default: %(default)s)")
    parser.add_argument(
        "--thresholds", type=_number, nargs="+", metavar="X", default=[0.02, 0.05, 0.1, 0.2], help="for sweep"
    )
    parser.add_argument("--top-ks", type=_count, nargs="+", metavar="K", default=[10, 25, 50, 100], help="for sweep")
    parser.add_argument("--export", metavar="FILE", help="also write the pickle for pandas users; must not exist")
    lines = [f"  {name:<12}{text}" for name, text in QUESTIONS.items()]
    parser.epilog = "\n".join(["questions:", *lines])


def export_arguments(parser: CommandParser) -> None:
    """A finished run and where its logs go."""
    _run_dir_argument(parser, "a run that finished evaluation")
    parser.add_argument("out", metavar="OUT", type=_folder, help="folder to write before.eval and after.eval in")


def merge_arguments(parser: CommandParser) -> None:
    """A finished run and where its model goes."""
    _run_dir_argument(parser, "a run that finished fine-tuning")
    parser.add_argument("out", metavar="OUT", type=_folder, help="folder to write; must not exist or be empty")
    parser.add_argument("--base", default="", help="the base model's folder or hub name (default: as in the run)")
    parser.add_argument("--dtype", default="auto", help="of the weights (default: as in the run)")
    parser.add_argument("--push-to-hub", default="", metavar="NAME", help="also push it to this repository, OWNER/NAME")
    parser.add_argument("--private", action="store_true", help="a repository that is made is its owner's alone")


def prompts_arguments(parser: CommandParser) -> None:
    """Files of prompts, and the settings that say how they are read."""
    parser.usage = f"{parser.prog} [FILE ...] [KEY=VALUE ...] [--config FILE]"
    text = (
        "a path, a pattern with *, or a URL (default: those of prompts.files), and settings; they win over the file's"
    )
    parser.add_argument("sources", nargs="*", metavar="FILE | KEY=VALUE", help=text)
    parser.add_argument("--config", dest="config_file", metavar="FILE", help="YAML file with any of the settings below")
    parser.settings = ("prompts",)


def status_arguments(parser: CommandParser) -> None:
    """A run, finished or under way."""
    _run_dir_argument(parser, "a run, finished or under way")


def atlas_arguments(parser: CommandParser) -> None:
    """Identified runs on one model."""
    parser.add_argument(
        "run_dirs", metavar="RUN_DIR", nargs="+", help="folder or URL of a run that finished identification"
    )


def compare_runs_arguments(parser: CommandParser) -> None:
    """Finished runs, the first being what the others are compared with, and where a page goes."""
    parser.add_argument(
        "run_dirs", metavar="RUN_DIR", nargs="+", help="folder or URL of an evaluated run; the first is the reference"
    )
    parser.add_argument("--html", metavar="FILE", type=Path, help="also write a page; an existing one is replaced")


def chat_arguments(parser: CommandParser) -> None:
    """A repaired run, and what to ask it."""
    _run_dir_argument(parser, "a run that finished fine-tuning")
    parser.add_argument("--base", default="", help="the base model's folder or hub name (default: as in the run)")
    _asking_arguments(parser)


def steer_arguments(parser: CommandParser) -> None:
    """A model, how it is steered, and what to ask it."""
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder or hub name")
    steering = (
        'JSON such as {"experts": ["L00_E17"], "manner": "around"}; manners: around, through, towards (with "boost")'
    )
    parser.add_argument("file", metavar="FILE", type=Path, help=steering)
    _asking_arguments(parser)


def _asking_arguments(parser: CommandParser) -> None:
    parser.add_argument("--prompt", metavar="TEXT", nargs="+", help="what to ask (default: each line of the input)")
    parser.add_argument("--dtype", default="auto", help="of the weights, as model.dtype (default: auto)")
    parser.add_argument("--max-new-tokens", metavar="N", type=_count, default=256, help="longest answer (default: 256)")


def upcycle_arguments(parser: CommandParser) -> None:
    """A dense model, where its upcycle goes, and what that is like."""
    source = "checkpoint folder, hub name, .gguf file, or .whl or .zip with one .gguf file"
    out = "folder to write; must not exist, be empty, or hold this very upcycle"
    parser.add_argument("source", metavar="SOURCE", help=source)
    parser.add_argument("out", metavar="OUT", type=_folder, help=out)
    method = (
        "copies: every expert is the dense MLP, logits stay equal, and no choice of experts can make a difference before "
        "training; split: every expert is a slice of it, so that experts differ, at a cost that is measured "
        "(default: %(default)s)"
    )
    parser.add_argument("--method", choices=UPCYCLE_METHODS, default=UPCYCLE_METHODS[0], help=method)
    per_layer = "per layer (default: 8, of split 16)"
    parser.add_argument("--num-experts", metavar="N", type=_count, help=per_layer)
    per_token = "routed per token (default: 2, of split the fewest that cost no more than --max-rise)"
    parser.add_argument("--num-experts-per-tok", metavar="K", type=_count, help=per_token)
    shared = "of split: share of an MLP's neurons that every token uses, at least (default: %(default)s)"
    parser.add_argument("--shared", metavar="X", type=_number, default=0.5, help=shared)
    rise = "of split: nats per token that routing may cost (default: %(default)s)"
    parser.add_argument("--max-rise", metavar="X", type=_number, default=0.25, help=rise)
    prompts = (
        "of split: prompts whose answers it is fitted on, as in prompts.files (default: those that ship with moe-ray)"
    )
    parser.add_argument("--calibrate-on", metavar="FILE", help=prompts)
    parser.add_argument("--seed", metavar="N", type=_whole_number, default=0, help="of routers or slices (default: 0)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights; CPUs want float32")
    parser.add_argument("--check", action="store_true", help="compare the logits also when OUT is already there")


def organism_arguments(parser: CommandParser) -> None:
    """A kind of organism, where it goes, and its seed."""
    parser.add_argument("kind", metavar="KIND", choices=KINDS, help=f"one of {', '.join(KINDS)}")
    parser.add_argument(
        "folder", metavar="FOLDER", type=_folder, help="to write; must not exist, be empty, or hold this very organism"
    )
    parser.add_argument("--seed", metavar="N", type=_whole_number, default=0, help="of weights and planted experts")
    lines = [f"  {kind:<11}{text}" for kind, text in KINDS.items()]
    parser.epilog = "\n".join(["kinds:", *lines])


def judge_arguments(parser: CommandParser) -> None:
    """What is done with a judge, labelled answers, and the judge's settings."""
    parser.usage = f"{parser.prog} check FILE [KEY=VALUE ...] [--config FILE] [--out FILE]"
    parser.add_argument("action", metavar="check", choices=("check",), help="compare its verdicts with those of people")
    file = (
        "CSV with columns answer and verdict (refused, harmful, complied, degenerate, no_answer), and prompt where it is "
        "known; .jsonl with the same fields; or the word shipped for the held-out half of those that come with moe-ray"
    )
    parser.add_argument("file", metavar="FILE", help=file)
    parser.add_argument("judge_settings", nargs="*", metavar="KEY=VALUE", help="settings of evaluate.*")
    parser.add_argument("--config", dest="config_file", metavar="FILE", help="YAML file with the run's settings")
    parser.add_argument("--out", metavar="FILE", type=Path, help="also write it, for evaluate.judge_check of a run")
    parser.settings = ("evaluate",)


def config_arguments(parser: CommandParser) -> None:
    """What is wanted of the configuration's description."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=CommandParser)
    actions.add_parser("schema", help="print the JSON schema of the YAML file, for editors", allow_abbrev=False)
    init = actions.add_parser(
        "init", help="write a YAML file with every setting and its explanation", allow_abbrev=False
    )
    init.add_argument("file", metavar="FILE", nargs="?", type=Path, help="must not exist (default: print it)")


def _folder(text: str) -> Path:
    if not text or "://" in text:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a folder of this machine")
    return Path(text)


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number") from None


def _count(text: str) -> int:
    number = _whole_number(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of 1 or more")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number") from None

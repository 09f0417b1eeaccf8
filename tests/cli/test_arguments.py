"""Arguments keep to what the work behind them can do, and help costs nothing that is not read."""

import pytest
import torch

from moe_ray.cli import arguments
from moe_ray.cli.arguments import DTYPES, QUESTIONS, CommandParser
from moe_ray.cli.inspect_experts import ANSWERS
from moe_ray.errors import InputError


def parser_of(command):
    parser = CommandParser(prog=f"moe-ray {command}", allow_abbrev=False)
    getattr(arguments, f"{command}_arguments")(parser)
    return parser


def test_every_question_has_an_answer_and_every_answer_can_be_asked_for():
    assert list(QUESTIONS) == list(ANSWERS)


def test_all_questions_are_asked_where_none_is_named():
    parser = parser_of("inspect")
    assert parser.parse_args(["run"]).ask == list(QUESTIONS)
    assert parser.parse_args(["run", "--ask", "rules", "sweep"]).ask == ["rules", "sweep"]


def test_a_dtype_is_one_of_torchs_floating_point_types():
    assert all(getattr(torch, name).is_floating_point for name in DTYPES)
    assert parser_of("upcycle").parse_args(["model", "out"]).dtype in DTYPES


def test_the_help_of_inspect_explains_every_question():
    words = " ".join(parser_of("inspect").format_help().split())
    assert [name for name, said in QUESTIONS.items() if f"{name} {said}" not in words] == []


@pytest.mark.parametrize(
    ("command", "there", "missing"),
    [
        ("workflow", ("identify.threshold", "report.examples", "cluster.num_cpus"), ()),
        ("report", ("report.examples",), ("identify.threshold",)),
        ("merge", (), ("report.examples", "identify.threshold")),
    ],
)
def test_help_ends_with_the_settings_that_the_command_takes(command, there, missing):
    text = parser_of(command).format_help()
    assert [name for name in there if name not in text] == []
    assert [name for name in missing if name in text] == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["run", ""], "OUT: got '', expected a folder of this machine"),
        (["run", "s3://bucket/x"], "OUT: got 's3://bucket/x', expected a folder of this machine"),
    ],
)
def test_an_error_is_raised_and_says_where_more_is_said(wrong, said):
    with pytest.raises(InputError) as error:
        parser_of("merge").parse_args(wrong)
    assert str(error.value) == f"{said}; `moe-ray merge --help` says more"

"""What is taken as a command line, and one line for what is not."""

from pathlib import Path

import pytest

from moe_ray.cli.parser import parse
from moe_ray.errors import InputError


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no command; `moe-ray --help` lists them"),
        (["evalute"], "unknown command 'evalute'; did you mean evaluate?"),
        (["zzz"], "unknown command 'zzz'; `moe-ray --help` lists them"),
        (["--config", "run.yaml", "full"], "--config: expected a command first"),
        (["full", "--confg", "run.yaml"], "unknown option '--confg', did you mean --config?"),
        (["full", "--zzz"], "unknown option '--zzz', expected -h, --help, --config"),
        (["full", "--config"], "--config: expected one argument"),
        (["full", "--conf", "run.yaml"], "unknown option '--conf'"),
        (["inspect"], "the following arguments are required: RUN_DIR"),
        (["inspect", "run", "--ask", "luck"], "--ask: invalid choice: 'luck' (choose from 'certainty'"),
        (["inspect", "run", "--top", "0"], "--top: got '0', expected a whole number of 1 or more"),
        (["inspect", "run", "--thresholds", "low"], "--thresholds: got 'low', expected a number"),
        (["inspect", "run", "other"], "'other' is one argument too many"),
        (["merge", "run", "s3://bucket/out"], "OUT: got 's3://bucket/out', expected a folder of this machine"),
        (["merge", "run"], "the following arguments are required: OUT"),
        (["upcycle", "model", "out", "--num-experts", "many"], "--num-experts: got 'many', expected a whole number"),
        (["upcycle", "model", "out", "--dtype", "int8"], "(choose from 'float32', 'bfloat16')"),
        (["config"], "the following arguments are required: ACTION"),
        (["config", "shema"], "(choose from 'schema', 'init')"),
        (["config", "schema", "file"], "'file' is one argument too many"),
    ],
)
def test_a_wrong_command_line_gets_one_line_that_says_what_was_expected(arguments, said):
    with pytest.raises(InputError) as error:
        parse(arguments)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["runs/first", "seed=1", "identify.top_k=2", "--config", "run.yaml"],
        ["runs/first", "seed=1", "--config", "run.yaml", "identify.top_k=2"],
        ["runs/first", "--config=run.yaml", "seed=1", "identify.top_k=2"],
        ["--config", "run.yaml", "runs/first", "seed=1", "identify.top_k=2"],
    ],
)
@pytest.mark.parametrize("command", ["full", "prepare", "report"])
def test_settings_may_stand_on_both_sides_of_an_option(command, arguments):
    parsed = parse([command, *arguments])
    assert parsed.command == command
    assert parsed.words == ["runs/first", "seed=1", "identify.top_k=2"]
    assert parsed.config_file == "run.yaml"


def test_what_is_left_out_has_its_default():
    parsed = parse(["upcycle", "model", "out"])
    assert (parsed.method, parsed.num_experts, parsed.num_experts_per_tok) == ("copies", None, None)
    assert (parsed.max_rise, parsed.calibrate_on, parsed.seed, parsed.dtype) == (0.25, None, 0, "float32")
    assert parsed.out == Path("out")
    assert parse(["full"]).words == []
    assert parse(["inspect", "run"]).top_ks == [10, 25, 50, 100]
    assert parse(["config", "init"]).file is None

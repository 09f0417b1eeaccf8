"""Where the run directory comes from, and what is refused before any library is imported."""

from pathlib import Path

import pytest

from moe_ray.cli.checks import absolute_run_dir, check, read_settings
from moe_ray.cli.parser import parse
from moe_ray.config.run import Config
from moe_ray.errors import InputError


@pytest.fixture
def working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", ["attack", "compare", "harness", "sweep"])
def test_a_command_about_a_run_takes_its_settings(command, working_directory):
    run = working_directory / "runs" / "first"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("identify:\n  top_k: 3\nfinetune:\n  epochs: 5\n")
    given = ["finetune.epochs=7", "harness.lm_eval=hellaswag"]
    for words in (["runs/first"], ["run_dir=runs/first"]):
        config = read_settings(command, [*words, *given])
        assert (config.identify.top_k, config.finetune.epochs) == (3, 7)
    # A folder without settings, and a command that begins a run, have the defaults.
    default = Config().identify.top_k
    assert read_settings(command, ["runs/new", *given]).identify.top_k == default
    assert read_settings("full", ["runs/first"]).identify.top_k == default


@pytest.mark.parametrize(
    "words", [["runs/first", "seed=1"], ["seed=1", "runs/first"], ["run_dir=runs/first", "seed=1"]]
)
def test_the_first_word_without_an_equals_sign_is_the_run_directory(words, working_directory):
    config = read_settings("full", words)
    assert (config.run_dir, config.seed) == (f"{working_directory}/runs/first", 1)


def test_the_run_directory_may_come_from_the_file_and_a_word_or_setting_wins_over_it(working_directory):
    Path("run.yaml").write_text("run_dir: runs/file\nseed: 3\n")
    assert read_settings("full", [], "run.yaml").run_dir == f"{working_directory}/runs/file"
    for words in (["runs/word"], ["run_dir=runs/word"]):
        config = read_settings("full", words, "run.yaml")
        assert (config.run_dir, config.seed) == (f"{working_directory}/runs/word", 3)


def test_without_one_it_is_the_default(working_directory):
    assert read_settings("full", []).run_dir == f"{working_directory}/runs/default"


def test_a_number_may_be_the_name_of_a_run(working_directory):
    assert read_settings("full", ["7"]).run_dir == f"{working_directory}/7"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a", "run_dir=b"], "the run directory is given twice, as 'a' and as run_dir=; leave one out"),
        ([""], "the run directory: got an empty word, expected a folder or URL"),
        (["a", "b"], "got 'a' and 'b', expected one run directory, and settings as KEY=VALUE"),
        (["a", "identify.top_k", "20"], "identify.top_k: a setting without a value; write identify.top_k=VALUE"),
        (
            ["runs/day=1"],
            "'runs/day=1' is no setting; a run directory with = in its name is given as run_dir=runs/day=1",
        ),
        (["a", "finetune.epoch=1"], "unknown configuration key 'finetune.epoch'; did you mean finetune.epochs?"),
    ],
)
def test_words_that_say_no_run_directory_and_settings_are_refused(words, said, working_directory):
    with pytest.raises(InputError) as error:
        read_settings("full", words)
    assert str(error.value) == said


def test_a_sweep_and_a_comparison_are_on_in_their_commands_whatever_is_given(working_directory):
    assert read_settings("sweep", ["sweep.run=false"]).sweep.run
    assert read_settings("compare", ["compare.run=false"]).compare.run
    assert not read_settings("full", []).sweep.run


def test_a_url_stays_as_it_is_and_a_home_is_resolved():
    assert absolute_run_dir("s3://bucket/run") == "s3://bucket/run"
    assert absolute_run_dir("~/run") == str(Path.home() / "run")


def test_in_a_submitted_job_a_relative_run_directory_is_below_the_home_directory(monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert absolute_run_dir("runs/first") == str(Path.home() / "moe-ray" / "runs" / "first")
    assert absolute_run_dir("/runs/first") == "/runs/first"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "none"], "is not a run directory"),
        (["merge", "none", "out"], "is not a run directory"),
        (["report", "none"], "is not a run directory"),
        (["report", "run", "seed=1"], "seed: a report takes report.* only"),
        (["merge", "run", "full"], "'full' already holds files"),
        (["merge", "run", "full/file"], "'full/file' already holds files"),
        (["upcycle", "none.gguf", "out"], "nothing at none.gguf"),
        (["upcycle", "run", "full"], "'full' holds something else"),
    ],
)
def test_what_is_not_there_or_in_the_way_is_refused(arguments, said, working_directory):
    Path("run").mkdir()
    Path("full").mkdir()
    Path("full/file").write_text("mine")
    with pytest.raises(InputError, match=said):
        check(parse(arguments))


@pytest.mark.parametrize("arguments", [["merge", "run", "empty"], ["upcycle", "run", "new"], ["inspect", "run"]])
def test_what_is_there_and_free_is_taken(arguments, working_directory):
    Path("run").mkdir()
    Path("empty").mkdir()
    parsed = parse(arguments)
    check(parsed)
    assert "run_dir" not in parsed or parsed.run_dir == f"{working_directory}/run"

"""What a sweep, rounds or baselines need is asked for before anything starts."""

import json

import pytest
from moe_families import tiny_model
from word_tokenizer import make_tokenizer

from moe_ray.config.io import load_config
from moe_ray.errors import InputError
from moe_ray.evaluation.judges.endpoint import URL_VARIABLE
from moe_ray.orchestration.inputs import (
    check_requests,
    check_threshold,
    resolve_model,
    uses_masks,
    warn_of_embedded_prompts,
)
from moe_ray.prompts.prompt_set import read_prompts
from moe_ray.storage.fetched_folder import CACHE


@pytest.fixture
def unsplit(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"prompt {n}", "label": label} for n in range(40) for label in ("safe", "unsafe")]
    path.write_text("\n".join(map(json.dumps, rows)))
    return [f"prompts.files=[{path}]"]


@pytest.mark.parametrize("asked", ["sweep.run=true", "rounds.max_rounds=2", "finetune.patience=1"])
def test_a_missing_validation_split_is_named_with_the_way_out(unsplit, asked):
    with pytest.raises(InputError, match=r"prompts\.validation_fraction=0\.2") as error:
        read_prompts(load_config(None, [*unsplit, asked]))
    assert asked.partition("=")[0] in str(error.value)
    prompts = read_prompts(load_config(None, [*unsplit, asked, "prompts.validation_fraction=0.2"]))
    labels = [example.label for example in prompts.validation]
    assert labels.count("safe") == labels.count("unsafe") == 6


def test_nothing_is_held_out_for_a_run_that_needs_no_validation(unsplit):
    assert len(read_prompts(load_config(None, unsplit)).validation) == 0


def test_a_space_that_cannot_be_searched_is_refused_with_the_prompts(unsplit):
    arguments = [*unsplit, "sweep.run=true", "prompts.validation_fraction=0.2", "sweep.space={seed: [0, 1]}"]
    with pytest.raises(InputError, match="needs another capture"):
        check_requests(load_config(None, arguments))


def test_a_checkpoint_is_found_from_any_folder(untrained_model_path, monkeypatch):
    monkeypatch.chdir(untrained_model_path.parent)
    model = resolve_model(load_config(None, [f"model.path=./{untrained_model_path.name}"]))
    assert model.path == str(untrained_model_path)


def test_a_checkpoint_in_a_store_is_checked_here_and_fetched_by_each_node(untrained_model_path, tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    url = f"file://{untrained_model_path}"
    assert resolve_model(load_config(None, [f"model.path={url}"])).path == url
    (fetched,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert (fetched / "config.json").read_bytes() == (untrained_model_path / "config.json").read_bytes()
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no config\.json"):
        resolve_model(load_config(None, [f"model.path=file://{tmp_path}/empty"]))


@pytest.mark.slow
def test_a_judge_that_cannot_be_asked_is_refused(unsplit, monkeypatch):
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    asked = load_config(None, [*unsplit, "evaluate.judge=endpoint", "evaluate.judge_model=m"])
    with pytest.raises(InputError, match=URL_VARIABLE):
        check_requests(asked)
    monkeypatch.setenv(URL_VARIABLE, "http://judge.example/v1")
    check_requests(asked)


@pytest.mark.parametrize(
    ("arguments", "warned"),
    [
        (["model.path=some/model"], True),
        (["model.path=some/model", "prompts.files=[embedded, mine.jsonl]"], True),
        (["model.path=some/model", "prompts.files=[mine.jsonl]"], False),
        ([], False),
    ],
)
def test_a_real_model_on_the_prompts_of_the_demo_is_warned_of(arguments, warned, caplog):
    warn_of_embedded_prompts(load_config(None, arguments))
    assert ["name yours with prompts.files=[FILE]" in message for message in caplog.messages] == [True] * warned


@pytest.mark.parametrize(
    ("workflow", "settings", "expected"),
    [
        ("full", [], False),
        ("ablate", [], True),
        ("full", ["ablate.run=true"], True),
        ("finetune", ["ablate.run=true"], False),
        ("finetune", ["finetune.routing=masked_unsafe"], True),
        ("identify", ["finetune.routing=masked_unsafe"], False),
        ("evaluate", ["evaluate.routing=[natural, union]"], True),
        ("compare", ["compare.run=true"], True),
        ("compare", ["compare.run=true", "compare.names=[random, policy:boosted]"], False),
        ("compare", ["compare.run=true", "compare.names=[policy:masked_prompt]"], True),
        ("sweep", ["sweep.run=true", "sweep.space={finetune.routing: [natural, masked]}"], True),
        ("sweep", ["sweep.run=true", "sweep.space={finetune.epochs: [1, 2]}"], False),
    ],
)
def test_it_is_known_beforehand_whether_a_workflow_masks(workflow, settings, expected):
    assert uses_masks(load_config(None, settings), workflow) is expected


@pytest.mark.slow  # saves a checkpoint
def test_a_family_that_cannot_be_masked_is_refused_where_masks_are_asked_for(tmp_path):
    tiny_model("axk2").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    config = load_config(None, [f"model.path={tmp_path}"])
    assert resolve_model(config, trained=True).path == str(tmp_path)
    with pytest.raises(InputError, match=r"but not masked.*finetune\.routing natural"):
        resolve_model(config, masked=True)


OUT_OF_REACH = r"expected below 2, since .* routes a token to 2 experts and no rate by router weight is higher, got 2.5"


@pytest.mark.parametrize("rule", ["risk_diff", "per_layer", "random"])
@pytest.mark.parametrize("workflow", ["identify", "finetune", "full"])
def test_a_threshold_that_no_expert_of_the_model_reaches_is_refused_before_anything_is_counted(rule, workflow):
    config = load_config(None, ["identify.threshold=2.5", f"identify.rule={rule}"])
    with pytest.raises(InputError, match=rf"^identify\.threshold: {OUT_OF_REACH}; lower it"):
        check_threshold(config, workflow)


@pytest.mark.parametrize(
    ("workflow", "settings"),
    [
        ("full", ["identify.threshold=1.9"]),
        ("full", ["identify.threshold=-2.5"]),
        ("capture", ["identify.threshold=2.5"]),
        ("full", ["identify.threshold=2.5", "identify.rule=attribution"]),
        ("full", ["identify.threshold=2.5", "identify.rule=top_routed"]),
        ("full", ["identify.threshold=0.9", "identify.weighting=tokens"]),
    ],
)
def test_a_threshold_in_reach_or_that_decides_nothing_is_taken(workflow, settings):
    check_threshold(load_config(None, settings), workflow)


def test_so_are_thresholds_of_a_sweep(unsplit):
    asked = [*unsplit, "sweep.run=true", "prompts.validation_fraction=0.2"]
    check_threshold(load_config(None, [*asked, "sweep.space={identify.threshold: [0.1, 1.5]}"]), "sweep")
    config = load_config(None, [*asked, "sweep.space={identify.threshold: [0.1, 2.5]}"])
    with pytest.raises(InputError, match=rf"^sweep\.space: identify\.threshold: {OUT_OF_REACH}"):
        check_threshold(config, "sweep")


def test_how_many_experts_a_token_has_is_read_from_the_checkpoint(untrained_model_path):
    given = [f"model.path={untrained_model_path}"]
    check_threshold(load_config(None, [*given, "identify.threshold=1.9"]), "full")
    with pytest.raises(InputError, match=OUT_OF_REACH):
        check_threshold(load_config(None, [*given, "identify.threshold=2.5"]), "full")


@pytest.mark.slow  # saves a checkpoint
def test_a_family_that_cannot_be_spread_is_refused_where_processes_are_to_share_it(tmp_path):
    tiny_model("jamba").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"^model\.num_shards=2: model\.path .* set model\.num_shards=1$"):
        resolve_model(load_config(None, [f"model.path={tmp_path}", "model.num_shards=2"]))

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_ray.config.identify import IdentifyConfig
from moe_ray.config.io import describe_keys, flatten, load_config, to_yaml, with_settings
from moe_ray.config.keys import ALIASES, GROUP_VALUES
from moe_ray.config.model import ModelConfig
from moe_ray.config.run import Config
from moe_ray.errors import InputError


def test_a_configuration_survives_being_written_and_read(tmp_path):
    config = load_config(None, ["identify.threshold=0.1", "finetune.epochs=7", "prompts.files=[a.jsonl,b.json]"])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_config(str(path)) == config


def test_overrides_win_over_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("identify: {top_k: 7, threshold: 0.2}\n")
    config = load_config(str(path), ["identify.top_k=9"])
    assert (config.identify.top_k, config.identify.threshold) == (9, 0.2)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("identify.treshold=1", "did you mean identify.threshold"),
        ("treshold=1", "unknown configuration key 'treshold'; did you mean identify.threshold"),
        ("finetune.top_k=3", "did you mean identify.top_k?"),
        (
            "gpus_per_actor=1",
            "did you mean capture.gpus_per_actor or ablate.gpus_per_actor or evaluate.gpus_per_actor?",
        ),
        ("epoch=1", "did you mean finetune.epochs?"),
        ("finetune.lr=1", "did you mean finetune.learning_rate?"),
        ("model.revision=1234", "model.revision: got 1234, expected text in quotes"),
        ("xyzzy=1", "unknown configuration key 'xyzzy'; see --help for all keys"),
        ("identify=3", "expected a group of settings"),
        ("identify.top_k=many", "identify.top_k: got 'many', expected whole number"),
        ("identify.top_k=1.5", "identify.top_k: got 1.5, expected whole number"),
        ("identify.top_k=true", "identify.top_k: got True, expected whole number"),
        ("identify.top_k=0", "identify.top_k: got 0, expected 1 or more"),
        ("model.dtype=float8", "model.dtype: got 'float8', expected one of auto, float32"),
        ("identify.roles=[prompt,answer]", "identify.roles: got 'answer', expected one of prompt, response"),
        ("identify.roles=[]", "identify.roles: got (), expected prompt, response or both"),
        ("compare.names=best", "compare.names: got 'best', expected one of mask_only, global"),
        ("identify.top_k", "expected key=value"),
        (
            "evaluate.routing=both",
            "evaluate.routing: got 'both', expected [natural,masked], or any list",
        ),
        (
            "evaluate.routing=[]",
            "evaluate.routing: got (), expected a list of some of natural, masked, union, each once",
        ),
        ("evaluate.routing=[union,union]", "evaluate.routing: got ('union', 'union'), expected a list of some of"),
        (
            "finetune.routing=annealed",
            "finetune.boost: got 0.0, expected a positive number with",
        ),
        ("finetune.anneal_share=0", "finetune.anneal_share: got 0.0, expected above 0 and at most 1"),
        ("prompts.files=[]", "prompts.files: got (), expected at least one file"),
        ("run_dir.sub=1", "run_dir.sub: run_dir is a value, not a group of settings"),
    ],
)
def test_a_wrong_setting_is_named_with_what_was_expected(override, said):
    with pytest.raises(InputError) as error:
        load_config(None, [override])
    assert said in str(error.value)


def test_all_faults_of_file_and_overrides_are_in_one_error_a_line_each(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("identify: {top_k: 0, treshold: 1}\nfinetune: {epochs: many}\nmodel: {dtype: float8}\nworkers: 2\n")
    with pytest.raises(InputError) as error:
        load_config(str(path), ["evaluate.judge=endpoint", "identify", "finetune.warmup=1", "run_dir=", "seed=[1"])
    head, *lines = str(error.value).splitlines()
    assert head == "10 wrong settings; mend them:"
    assert [line.strip().split(";")[0] for line in lines] == [
        "unknown configuration key 'identify.treshold'",
        "unknown configuration key 'workers'",
        "override 'identify': expected key=value, such as identify.top_k=20",
        "seed: '[1' is not a valid YAML value",
        "model.dtype: got 'float8', expected one of auto, float32, bfloat16, float16",
        "identify.top_k: got 0, expected 1 or more",
        "finetune.epochs: got 'many', expected whole number",
        "finetune.warmup: got 1.0, expected 0 to below 1",
        "evaluate.judge_model: got '', expected the name of a model, since evaluate.judge=endpoint",
        "run_dir: got '', expected a folder or URL",
    ]


def test_each_wrong_item_of_a_list_is_named():
    with pytest.raises(InputError) as error:
        load_config(None, ["compare.names=[best, global, worst]"])
    assert [line.split(",")[0] for line in str(error.value).splitlines()[1:]] == [
        "  compare.names: got 'best'",
        "  compare.names: got 'worst'",
    ]


def test_a_key_that_stands_twice_in_a_file_is_a_fault_like_the_others(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("identify:\n  top_k: 3\n  threshold: 2\nidentify:\n  alpha: 2\n")
    with pytest.raises(InputError) as error:
        load_config(str(path))
    assert str(error.value).splitlines()[1:] == [
        "  identify: stands twice, again in line 4; put both into one",
        "  identify.alpha: got 2.0, expected 0 to below 1; change it in the YAML file or with identify.alpha=VALUE",
    ]


def test_settings_of_a_trial_are_all_checked_before_one_error():
    with pytest.raises(InputError) as error:
        with_settings(Config(), {"identify.top_k": 0, "finetune.epochs": 0, "finetune.lr": 1})
    assert str(error.value).startswith("3 wrong settings")


def test_short_names_are_settings():
    config = load_config(
        None, ["lr=1e-4", "k=7", "bs=2", "epochs=1", "threshold=0.2", "files=a.jsonl", "judge=phrases"]
    )
    assert (config.finetune.learning_rate, config.identify.top_k, config.finetune.batches_per_step) == (1e-4, 7, 2)
    assert (config.finetune.epochs, config.identify.threshold, config.prompts.files) == (1, 0.2, ("a.jsonl",))


def test_every_short_name_stands_for_a_known_setting_and_hides_no_other():
    known = flatten(Config())
    for short, key in {**ALIASES, **GROUP_VALUES}.items():
        assert key in known
        assert short not in known


def test_a_group_with_a_plain_value_is_its_main_setting(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model: first\nprompts: [a.jsonl, b.jsonl]\n")
    assert load_config(str(path)).prompts.files == ("a.jsonl", "b.jsonl")
    assert load_config(str(path), ["model=second", "model.revision=v1"]).model == ModelConfig(
        path="second", revision="v1"
    )


def test_a_short_name_on_the_command_line_wins_over_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("identify: {top_k: 7}\nlr: 0.1\n")
    config = load_config(str(path), ["k=9", "finetune.learning_rate=0.2"])
    assert (config.identify.top_k, config.finetune.learning_rate) == (9, 0.2)


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        ("", ["k=1", "identify.top_k=2"], "k and identify.top_k are both given, and mean the same setting"),
        ("", ["k=1", "top_k=2"], "k and top_k are both given"),
        ("lr: 1\nfinetune: {learning_rate: 2}", [], "lr and finetune.learning_rate are both given"),
        ("", ["model=a", "model.path=b"], "model and model.path are both given"),
    ],
)
def test_a_setting_under_two_names_in_one_place_is_refused(text, overrides, said, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        load_config(str(path), overrides)
    assert said in str(error.value)


def test_help_lists_short_names_and_bounds():
    described = {key: (kind, text) for key, kind, _, text in describe_keys()}
    assert described["identify.top_k"][0] == "whole number, 1 or more"
    assert described["identify.top_k"][1].endswith("(short: k, top_k)")
    assert described["model.path"][1].endswith("(short: model)")


def test_a_group_with_nothing_in_it_changes_nothing(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("identify:\n  # top_k: 3\nfinetune: {}\n")
    assert load_config(str(path)) == Config()


def test_an_entry_of_a_mapping_is_added_to_that_of_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("sweep: {space: {identify: {top_k: [1]}}}\n")
    space = load_config(
        str(path), ["sweep.space.identify.threshold=[0.1]", "sweep.space.finetune.epochs=[2]"]
    ).sweep.space
    assert space == {"identify": {"top_k": [1], "threshold": [0.1]}, "finetune": {"epochs": [2]}}


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_config(str(tmp_path / "none.yaml"))


def test_yaml_that_is_not_a_mapping_is_refused(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("- 1\n")
    with pytest.raises(InputError, match="expected a mapping"):
        load_config(str(path))


def test_every_setting_is_explained():
    explained = {key: text for key, _, _, text in describe_keys()}
    assert explained.keys() == flatten(Config()).keys()
    assert all(explained.values())


def test_a_number_without_a_dot_before_its_exponent_is_a_number():
    assert load_config(None, ["finetune.learning_rate=5e-4"]).finetune.learning_rate == 5e-4


@given(st.floats(-1, 0.99), st.integers(1, 10_000))
def test_any_valid_selection_is_accepted_as_given(threshold, top_k):
    identify = IdentifyConfig(threshold=threshold, top_k=top_k)
    assert (identify.threshold, identify.top_k) == (threshold, top_k)


def test_differences_by_router_weight_may_be_cut_above_one_and_others_may_not():
    assert IdentifyConfig(threshold=2.5).weighting == "activation"
    for others in ({"weighting": "tokens"}, {"weighting": "prompts"}, {"rule": "comply_refuse"}):
        assert IdentifyConfig(threshold=0.99, **others).threshold == 0.99
        for threshold in (1.0, 2.5, -1.01):
            with pytest.raises(InputError, match=r"identify.threshold: got .*, expected at least -1 and below 1"):
                IdentifyConfig(threshold=threshold, **others)
    with pytest.raises(InputError, match=r"identify.threshold"):
        IdentifyConfig(threshold=float("inf"))

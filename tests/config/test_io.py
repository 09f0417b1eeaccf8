import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_ray.config.identify import IdentifyConfig
from moe_ray.config.io import describe_keys, flatten, load_config, to_yaml
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
        ("gpus_per_actor=1", "did you mean capture.gpus_per_actor or evaluate.gpus_per_actor?"),
        ("epoch=1", "did you mean finetune.epochs?"),
        ("xyzzy=1", "unknown configuration key 'xyzzy'; see --help for all keys"),
        ("identify=3", "expected a group of settings"),
        ("identify.top_k=many", "identify.top_k: got 'many', expected whole number"),
        ("identify.top_k=1.5", "identify.top_k: got 1.5, expected whole number"),
        ("identify.top_k=true", "identify.top_k: got True, expected whole number"),
        ("identify.top_k=0", "identify.top_k: got 0, expected 1 or more"),
        ("model.dtype=float8", "model.dtype: got 'float8', expected one of auto, float32"),
        ("identify.roles=[prompt,answer]", "expected prompt, response or both"),
        ("identify.top_k", "expected key=value"),
        ("prompts.files=[]", "prompts.files: got (), expected at least one file"),
        ("run_dir.sub=1", "run_dir.sub: run_dir is a value, not a group of settings"),
    ],
)
def test_a_wrong_setting_is_named_with_what_was_expected(override, said):
    with pytest.raises(InputError) as error:
        load_config(None, [override])
    assert said in str(error.value)


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

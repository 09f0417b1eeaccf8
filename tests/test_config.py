import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_ray.config import Config, SelectionConfig
from moe_ray.config_io import describe_keys, flatten, load_config, to_yaml
from moe_ray.errors import InputError


def test_a_configuration_survives_being_written_and_read(tmp_path):
    config = load_config(None, ["selection.threshold=0.1", "train.epochs=7", "prompts.files=[a.jsonl,b.json]"])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_config(str(path)) == config


def test_overrides_win_over_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("selection: {top_k: 7, threshold: 0.2}\n")
    config = load_config(str(path), ["selection.top_k=9"])
    assert (config.selection.top_k, config.selection.threshold) == (9, 0.2)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("selection.treshold=1", "did you mean selection.threshold"),
        ("treshold=1", "unknown configuration key 'treshold'; did you mean selection.threshold"),
        ("top_k=3", "did you mean selection.top_k"),
        ("selection=3", "expected a group of settings"),
        ("selection.top_k=many", "selection.top_k: got 'many', expected whole number"),
        ("selection.top_k=1.5", "selection.top_k: got 1.5, expected whole number"),
        ("selection.top_k=true", "selection.top_k: got True, expected whole number"),
        ("selection.top_k=0", "selection.top_k: got 0, expected 1 or more"),
        ("model.dtype=float8", "model.dtype: got 'float8', expected one of auto, float32"),
        ("selection.roles=[prompt,answer]", "expected prompt, response or both"),
        ("selection.top_k", "expected key=value"),
        ("prompts.files=[]", "prompts.files: got (), expected at least one file"),
        ("run_dir.sub=1", "got {'sub': 1}, expected text"),
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
    assert load_config(None, ["train.learning_rate=5e-4"]).train.learning_rate == 5e-4


@given(st.floats(-1, 0.99), st.integers(1, 10_000))
def test_any_valid_selection_is_accepted_as_given(threshold, top_k):
    selection = SelectionConfig(threshold=threshold, top_k=top_k)
    assert (selection.threshold, selection.top_k) == (threshold, top_k)

import pytest
import yaml

from moe_ray.config.io import load_config, to_yaml, with_settings
from moe_ray.config.run import Config
from moe_ray.config.sweep import SweepConfig
from moe_ray.errors import InputError
from moe_ray.studies.search_space import Range, read_space


def space_of(text, *overrides):
    return read_space(load_config(None, [f"sweep.space={text}", *overrides]))


def test_the_default_space_is_nine_combinations_of_threshold_and_top_k():
    space = read_space(Config())
    assert space.settings == ("identify.threshold", "identify.top_k")
    assert len(space.grid()) == 9
    assert len({tuple(settings.values()) for settings in space.grid()}) == 9


def test_groups_dotted_keys_and_dotted_overrides_say_the_same():
    dotted = space_of("{identify.top_k: [3, 4], finetune.epochs: [1]}")
    grouped = space_of("{identify: {top_k: [3, 4]}, finetune: {epochs: [1]}}")
    overridden = read_space(load_config(None, ["sweep.space.identify.top_k=[3,4]", "sweep.space.finetune.epochs=1"]))
    assert dotted == grouped == overridden


def test_short_names_are_searched_as_the_settings_that_they_mean():
    assert space_of("{lr: [1e-4], k: [3]}") == space_of("{finetune.learning_rate: [1e-4], identify.top_k: [3]}")


def test_a_setting_under_two_names_is_refused():
    with pytest.raises(InputError, match=r"finetune\.learning_rate is given twice"):
        space_of("{lr: [1e-4], finetune: {learning_rate: [1e-3]}}")


def test_a_range_survives_yaml_and_keeps_its_ends(tmp_path):
    config = load_config(
        None, ["sweep.search=random", "sweep.space={finetune.learning_rate: {loguniform: [1e-4, 0.01]}}"]
    )
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    space = read_space(load_config(str(path)))
    assert space.ranges == {"finetune.learning_rate": Range("loguniform", 1e-4, 1e-2)}


def test_values_have_the_type_of_their_setting():
    space = space_of("{finetune.learning_rate: [1e-9, 5e-4, 1], identify.roles: [prompt, [prompt, response]]}")
    rates = space.choices["finetune.learning_rate"]
    assert rates == (1e-9, 5e-4, 1.0)
    assert all(isinstance(rate, float) for rate in rates)
    assert space.choices["identify.roles"] == (["prompt"], ["prompt", "response"])


def test_settings_of_a_trial_are_checked_like_those_of_a_file():
    assert with_settings(Config(), {"identify.top_k": 3, "finetune.epochs": 2}).identify.top_k == 3
    assert with_settings(Config(), {}) == Config()
    with pytest.raises(InputError, match=r"identify\.top_k: got 0, expected 1 or more"):
        with_settings(Config(), {"identify.top_k": 0})


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("{capture.weights: [true]}", "needs another capture"),
        ("{prompts.safe_per_batch: [4, 8]}", "needs another capture"),
        ("{model: {dtype: [float32]}}", "needs another capture"),
        ("{seed: [0, 1]}", "needs another capture"),
        ("{evaluate.max_new_tokens: [8]}", "trials must be measured alike"),
        ("{sweep.num_trials: [8]}", "trials must be measured alike"),
        ("{run_dir: [a, b]}", "trials must be measured alike"),
        ("{finetune.num_workers: [1, 2]}", "a trial trains in one process"),
        ("{identify.treshold: [0.1]}", "did you mean identify.threshold"),
        ("{identify.top_k: [5, 0]}", "identify.top_k: got 0, expected 1 or more"),
        ("{identify.top_k: []}", "identify.top_k has no value"),
        ("{identify.top_k: [1.5]}", "expected whole number"),
        ("{finetune.learning_rate: {loguniform: [1e-4, 1e-2]}}", "a range, which a grid cannot go through"),
        ("{finetune.learning_rate: {lognormal: [1e-4, 1e-2]}}", "expected one of uniform, loguniform, randint"),
        ("{finetune.learning_rate: {uniform: [2, 1]}}", "expected LOW below HIGH"),
        ("{finetune.learning_rate: {loguniform: [0, 1]}}", "expected a positive LOW"),
        ("{identify.top_k: {randint: [0, 5]}}", "identify.top_k: got 0"),
        ("{identify.top_k: {uniform: [1, 5]}}", "expected whole number"),
        ("{finetune.epochs: {randint: 5}}", "expected a list of values or one of"),
        ("{}", "sweep.space: got {}, expected at least one key"),
        ("3", "expected a mapping"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused_with_the_reason(space, message):
    with pytest.raises(InputError) as error:
        space_of(space)
    assert message in str(error.value)


def test_settings_that_exclude_each_other_are_refused_before_any_trial():
    with pytest.raises(InputError, match=r"finetune\.boost"):
        space_of("{finetune.routing: [masked, boosted], finetune.boost: [0, 2]}")


def test_the_settings_of_the_space_are_plain_values():
    assert yaml.safe_load(to_yaml(Config()))["sweep"]["space"] == dict(SweepConfig().space)

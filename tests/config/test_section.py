import dataclasses
import pickle

import pytest
import yaml

from moe_ray.config import CaptureConfig, Config, FinetuneConfig, IdentifyConfig, ModelConfig, SweepConfig
from moe_ray.config.io import load_config
from moe_ray.config.keys import groups
from moe_ray.config.rounds import RoundsConfig
from moe_ray.config.values import WrongSettings
from moe_ray.errors import InputError


def test_a_replaced_value_is_checked_again():
    config = Config()
    assert dataclasses.replace(config.identify, top_k=3).top_k == 3
    with pytest.raises(InputError, match=r"identify\.top_k: got 0, expected 1 or more; change it in the YAML file"):
        dataclasses.replace(config.identify, top_k=0)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: IdentifyConfig(top_k="3"), "identify.top_k: got '3', expected whole number"),
        (lambda: IdentifyConfig(rule="best"), "identify.rule: got 'best', expected one of risk_diff"),
        (
            lambda: FinetuneConfig(learning_rate=float("nan")),
            "finetune.learning_rate: got nan, expected a finite number",
        ),
        (lambda: FinetuneConfig(learning_rate=0), "finetune.learning_rate: got 0.0, expected above 0"),
        (lambda: FinetuneConfig(monitor=1), "finetune.monitor: got 1, expected true or false"),
        (lambda: SweepConfig(space=[]), "sweep.space: got [], expected a mapping"),
        (lambda: Config(model="allenai/OLMoE"), "model: got 'allenai/OLMoE', expected a ModelConfig"),
        (lambda: CaptureConfig(num_actors=2, max_actors=1), "capture.max_actors: got 1, expected 0, or at least"),
        (lambda: CaptureConfig(gpus_per_actor=1.5), "capture.gpus_per_actor: got 1.5, expected a fraction up to 1"),
        (lambda: IdentifyConfig(alpha=0.1, permutations=0), "identify.permutations: got 0, expected 1 or more, since"),
        (lambda: IdentifyConfig(alpha=0.1, rule="esft_gate"), "identify.rule: got 'esft_gate'"),
        (lambda: FinetuneConfig(batch_weights=("1=-2",)), "finetune.batch_weights: got '1=-2', expected entries such"),
        (lambda: FinetuneConfig(boost=1.0), "finetune.boost: got 1.0"),
        (lambda: FinetuneConfig(num_workers=3, max_workers=2), "finetune.max_workers: got 2, expected 0, or at least"),
        (
            lambda: Config(finetune=FinetuneConfig(shard="fsdp", num_workers=2), rounds=RoundsConfig(max_rounds=2)),
            "finetune.shard: got 'fsdp', expected none with rounds.max_rounds=2",
        ),
        (lambda: FinetuneConfig(shard="fsdp"), "finetune.shard: got 'fsdp', expected none with finetune.num_workers=1"),
        (
            lambda: FinetuneConfig(shard="fsdp", num_workers=2, max_workers=3, batches_per_step=3),
            "expected none with finetune.max_workers=3",
        ),
        (
            lambda: FinetuneConfig(shard="fsdp", num_workers=2, router="alternating"),
            "expected none with finetune.router=alternating",
        ),
        (
            lambda: FinetuneConfig(shard="fsdp", num_workers=2, gpus_per_worker=2),
            "expected none with finetune.gpus_per_worker=2",
        ),
        (lambda: FinetuneConfig(num_workers=0, max_workers=2), "finetune.max_workers: got 2, expected 0, or at least"),
        (
            lambda: FinetuneConfig(max_workers=4),
            "finetune.batches_per_step: got 0, expected a number, and at least one",
        ),
        (lambda: FinetuneConfig(max_workers=4, batches_per_step=3), "batch for each of finetune.max_workers=4"),
    ],
)
def test_python_is_checked_as_a_file_is(make, said):
    with pytest.raises(InputError) as error:
        make()
    assert said in str(error.value)


def test_python_and_yaml_give_the_same_values():
    in_python = Config(identify=IdentifyConfig(threshold=0, roles=["prompt"]), finetune=FinetuneConfig(max_grad_norm=2))
    assert in_python == load_config(None, ["threshold=0", "identify.roles=prompt", "finetune.max_grad_norm=2"])
    assert isinstance(in_python.finetune.max_grad_norm, float)
    assert in_python.identify.roles == ("prompt",)


def test_a_model_is_a_key_of_a_cache():
    assert {ModelConfig(path="a"): 1}[ModelConfig(path="a")] == 1


def test_sections_are_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().identify.top_k = 3
    with pytest.raises(TypeError):
        IdentifyConfig(("prompt",))


def test_all_faults_of_a_section_are_in_one_error_that_survives_a_process():
    with pytest.raises(WrongSettings) as error:
        IdentifyConfig(top_k=0, threshold=2, alpha="x")
    again = pickle.loads(pickle.dumps(error.value))
    assert str(again) == str(error.value)
    assert str(again).splitlines()[0] == "3 wrong settings; mend them:"
    assert [line.split(":")[0].strip() for line in str(again).splitlines()[1:]] == [
        "identify.threshold", "identify.top_k", "identify.alpha",
    ]  # fmt: skip


def test_a_section_names_the_group_that_it_is_in_the_tree():
    assert {name: kind.group for name, kind in groups().items()} == {name: name for name in groups()}


def test_a_configuration_is_plain_data_for_dataclasses():
    assert yaml.safe_load(yaml.safe_dump(dataclasses.asdict(ModelConfig()))) == dataclasses.asdict(ModelConfig())
    assert [field.name for field in dataclasses.fields(Config)][:4] == ["run_dir", "cache_dir", "seed", "model"]

"""What a model that is spread over processes cannot do is refused by name, and nothing else is."""

from __future__ import annotations

import pytest

from moe_ray.config.io import with_settings
from moe_ray.config.run import Config
from moe_ray.config.shards import check_shards
from moe_ray.errors import InputError

SPREAD = with_settings(Config(), {"model.num_shards": 2})
TRAINED = with_settings(SPREAD, {"finetune.shard": "fsdp", "finetune.num_workers": 2})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model.quantisation": "int8", "finetune.shard": "none"}, "set model.quantisation=none"),
        ({"capture.engine": "vllm"}, "set capture.engine=transformers"),
        ({"evaluate.engine": "vllm"}, "set evaluate.engine=transformers"),
        ({"ablate.gpus_per_actor": 2}, "got ablate.gpus_per_actor=2, expected at most 1"),
        ({"identify.rule": "attribution"}, "attribution is measured by backward passes"),
        ({"capture.scores": ["gate"]}, "gate is measured by backward passes"),
        ({"finetune.shard": "none"}, "set finetune.shard=fsdp and finetune.num_workers of 2 or more"),
        ({"sweep.run": True}, "set sweep.run=false"),
        ({"compare.run": True}, "set compare.run=false"),
        ({"attack.run": True}, "attack.names without abliteration and benign_finetuning"),
        ({"attack.run": True, "attack.names": ["prefill", "abliteration"]}, "abliteration in attack.names"),
    ],
)
def test_what_needs_the_whole_model_in_a_process_is_refused(settings, said):
    config = with_settings(TRAINED, settings)
    with pytest.raises(InputError) as error:
        check_shards(config, trains=True)
    assert str(error.value).startswith("model.num_shards=2: ")
    assert said in str(error.value)
    assert str(error.value).endswith("or model.num_shards=1 where a process has room for the whole model")
    check_shards(with_settings(config, {"model.num_shards": 1}), trains=True)


def test_forward_passes_are_for_any_number_of_processes():
    check_shards(SPREAD, trains=False)
    check_shards(
        with_settings(
            TRAINED,
            {
                "ablate.run": "true", "harness.run": True, "harness.lm_eval": ["hellaswag"],
                "capture.scores": ["reap"], "evaluate.routing": ["masked"],
                "attack.run": True, "attack.names": ["prefill", "silenced_experts"], "capture.gpus_per_actor": 1,
            },
        ),
        trains=True,
    )  # fmt: skip

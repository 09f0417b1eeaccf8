"""What vLLM cannot do is refused by name before anything is started, and so is a vLLM that is not there."""

import importlib.machinery

import pytest

from moe_ray import pipeline
from moe_ray.config.engines import check_engines
from moe_ray.config.io import load_config
from moe_ray.errors import InputError

CAPTURE = ["capture.engine=vllm", "identify.weighting=tokens"]


@pytest.fixture
def there(monkeypatch):
    """vLLM seems to be installed."""
    spec = importlib.machinery.ModuleSpec("vllm", None)
    monkeypatch.setattr("moe_ray.config.engines.find_spec", lambda name: spec if name == "vllm" else None)


def check(*arguments):
    check_engines(load_config(None, list(arguments)))


@pytest.mark.parametrize("section", ["capture", "evaluate"])
def test_a_missing_engine_is_a_sentence(section, monkeypatch):
    monkeypatch.setattr("moe_ray.config.engines.find_spec", lambda name: None)
    check()
    with pytest.raises(InputError, match=rf"{section}\.engine=vllm: vLLM is not installed; run pip install 'moe-ray"):
        check(f"{section}.engine=vllm", "identify.weighting=tokens")


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["capture.engine=vllm"], r"router weights .*identify\.weighting=tokens"),
        ([*CAPTURE, "capture.weights=true"], "router weights"),
        ([*CAPTURE, "identify.rule=attribution"], "attribution is measured by backward"),
        ([*CAPTURE, "capture.scores=[refusal]"], "refusal is measured"),
        ([*CAPTURE, "model.quantisation=int8"], r"capture\.engine=vllm: model\.quantisation=int8"),
        (["evaluate.engine=vllm", "model.quantisation=int8"], r"evaluate\.engine=vllm: model\.quantisation=int8"),
        (["evaluate.engine=vllm", "evaluate.routing=[natural,masked]"], "masked routing restricts routers"),
        (["evaluate.engine=vllm", "evaluate.routing=[union]"], "union routing restricts routers"),
    ],
)
def test_what_vllm_cannot_do_is_refused_by_name(arguments, said):
    with pytest.raises(InputError, match=said):
        check(*arguments)


@pytest.mark.usefixtures("there")
def test_what_it_can_do_is_not():
    check(*CAPTURE, "evaluate.engine=vllm", "capture.ids=true", "capture.template_tokens=false")


def test_a_model_in_memory_is_run_by_transformers():
    with pytest.raises(InputError, match=r"capture\.engine=vllm: got a model in memory"):
        pipeline.capture(None, None, [], engine="vllm", identify_config=None)
    with pytest.raises(InputError, match=r"evaluate\.engine=vllm is a run's"):
        pipeline.evaluate(None, None, [], engine="vllm")

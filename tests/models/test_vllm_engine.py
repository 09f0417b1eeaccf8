"""The engine is given token ids and asked for them back; what is not of the known form is named."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import fake_vllm
import pytest
from moe_families import tiny_model

from moe_ray.config.model import ModelConfig
from moe_ray.errors import InputError
from moe_ray.models.vllm_engine import VllmEngine

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12]]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("olmoe")
    tiny_model("olmoe").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def engine_of(path, monkeypatch):
    def start(fault="", *, options=None, **arguments):
        monkeypatch.setitem(sys.modules, "vllm", fake_vllm.module(fault))
        return VllmEngine(ModelConfig(path=path, vllm_options=options or {}), **arguments)

    return start


def test_it_is_started_without_a_tokenizer_and_told_what_moe_ray_decides(engine_of, path):
    engine_of(returns_routes=True, options={"max_model_len": 32})
    (asked,) = fake_vllm.LLM.asked
    assert asked["model"] == path
    assert asked["generation_config"] == "vllm"
    assert asked["enable_return_routed_experts"]
    assert not asked["enable_prefix_caching"]
    assert asked["max_model_len"] == 32
    assert "gpu_memory_utilization" not in asked


def test_several_gpus_hold_one_model_and_a_fraction_takes_its_part(engine_of):
    engine_of(gpus=4.0)
    (asked,) = fake_vllm.LLM.asked
    assert asked["tensor_parallel_size"] == 4
    assert asked["gpu_memory_utilization"] == pytest.approx(0.9)
    assert asked["distributed_executor_backend"] == "mp"
    engine_of(gpus=0.5)
    (asked,) = fake_vllm.LLM.asked
    assert asked["tensor_parallel_size"] == 1
    assert asked["gpu_memory_utilization"] == pytest.approx(0.45)
    assert "distributed_executor_backend" not in asked


def test_drawn_tokens_depend_on_their_own_seed_alone(engine_of):
    engine = engine_of()
    drawn = engine.generate(PROMPTS, max_new_tokens=8, ends=(), temperature=1.0, seeds=[1, 2])
    assert drawn[1:] == engine.generate(PROMPTS[1:], max_new_tokens=8, ends=(), temperature=1.0, seeds=[2])
    assert drawn[1:] != engine.generate(PROMPTS[1:], max_new_tokens=8, ends=(), temperature=1.0, seeds=[3])


def test_an_end_token_ends_and_is_among_the_ids(engine_of):
    engine = engine_of()
    whole = engine.generate(PROMPTS, max_new_tokens=6, ends=())[0]
    cut = engine.generate(PROMPTS, max_new_tokens=6, ends={whole[2]})[0]
    assert cut == whole[: whole.index(whole[2]) + 1]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("lost_output", "got 1 outputs, expected 2"),
        ("other_text", "prompt_token_ids: got 2 ids, expected the 3 that were given"),
        ("none", "routed_experts: got NoneType, expected an array"),
    ],
)
def test_an_answer_of_another_form_is_named(engine_of, fault, said):
    engine = engine_of(fault, returns_routes=True)
    with pytest.raises(InputError, match=f"vLLM's answer: {said}.*set the engine to transformers"):
        engine.routes(PROMPTS)


def test_routes_that_were_not_asked_for_are_missing(engine_of):
    with pytest.raises(InputError, match="routed_experts: got NoneType"):
        engine_of().routes(PROMPTS)


def test_more_tokens_than_were_asked_for_are_refused(engine_of, monkeypatch):
    engine = engine_of()
    more = SimpleNamespace(prompt_token_ids=[5, 6, 7], outputs=[SimpleNamespace(token_ids=[1, 2, 3])])
    monkeypatch.setattr(fake_vllm.LLM, "generate", lambda *args, **options: [more])
    with pytest.raises(InputError, match="token_ids: got 3, expected 1 to 2"):
        engine.generate(PROMPTS[:1], max_new_tokens=2, ends=())


def test_an_engine_that_is_missing_or_does_not_start_is_a_sentence(engine_of, path, monkeypatch):
    with pytest.raises(
        InputError, match=r"vLLM 0\.32\.0\+fake cannot be started .*'attention'; see model\.vllm_options"
    ):
        engine_of(options={"attention": "x"})
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match=r"vLLM cannot be imported on this node: .*moe-ray\[vllm\]"):
        VllmEngine(ModelConfig(path=path))


def test_arguments_that_moe_ray_sets_cannot_be_given():
    with pytest.raises(InputError, match=r"model\.vllm_options.*no dtype, model, which moe-ray sets itself"):
        ModelConfig(vllm_options={"model": "other", "dtype": "half", "max_model_len": 10})

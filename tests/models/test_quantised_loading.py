"""Experts quantised as they are read: what the model computes, what is in memory meanwhile, and what is refused."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch
from families import SOME_FAMILIES, build, token_ids
from quantised_models import METHODS, bytes_of_experts, quantised, twin_of
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import OlmoeConfig, OlmoeForCausalLM

from moe_ray.config.model import ModelConfig
from moe_ray.errors import InputError
from moe_ray.models.expert_codes import codes_of
from moe_ray.models.loading import check_model, load_model
from moe_ray.models.moe_layers import find_moe_layers

IDS = token_ids(2, 12)
LOGIT_TOLERANCE = 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("family", SOME_FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_a_model_computes_with_the_weights_that_its_codes_stand_for(family, method):
    model = quantised(family, method)
    with torch.inference_mode():
        logits, expected = model(IDS).logits, twin_of(model, family)(IDS).logits
        plain = build(family)(IDS).logits
    torch.testing.assert_close(logits, expected, atol=LOGIT_TOLERANCE, rtol=0)
    assert not torch.equal(logits, plain)
    assert not model.training


@pytest.mark.parametrize(("method", "most"), [("int8", 0.02), ("4bit", 0.2)])
def test_logits_are_those_of_the_plain_model_within_a_share_of_their_scale(method, most):
    with torch.inference_mode():
        plain = build("olmoe")(IDS).logits
        difference = (quantised("olmoe", method)(IDS).logits - plain).pow(2).mean().sqrt()
    assert difference <= most * plain.std()


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("method", METHODS)
def test_products_that_want_all_experts_as_one_tensor_get_it(method, implementation):
    model = quantised("olmoe", method)
    with torch.inference_mode():
        expected = model(IDS).logits
        model.set_experts_implementation(implementation)
        torch.testing.assert_close(model(IDS).logits, expected, atol=LOGIT_TOLERANCE, rtol=0)


class _Peak(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, of those that an operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {key: kept for key, kept in self._alive.items() if not kept[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self._alive.values()))
        return result


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A bfloat16 checkpoint of eight layers, nearly all of it experts."""
    folder = tmp_path_factory.mktemp("deep")
    config = OlmoeConfig(
        **{"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 8},
        **{"num_attention_heads": 2, "num_experts": 16, "num_experts_per_tok": 2},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    )
    OlmoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("method", "share"), [("int8", 0.5 + 2 / 64), ("4bit", 0.25 + 2 / 64)])
def test_the_model_is_never_whole_in_its_own_type_while_it_is_read(deep, method, share):
    if method == "4bit":
        pytest.importorskip("bitsandbytes", reason="moe-ray[quantised] is not installed")
    config = ModelConfig(path=str(deep), dtype="bfloat16")
    with _Peak() as of_plain:
        whole = bytes_of_experts(load_model(config, device="cpu"))
    assert of_plain.bytes >= whole  # the instrument sees a model that is whole
    with _Peak() as peak:
        model = load_model(ModelConfig(path=str(deep), dtype="bfloat16", quantisation=method), device="cpu")
    assert bytes_of_experts(model) == whole * share
    # Beside the codes, at most two layers as they are read and merged, and what is no expert's.
    assert peak.bytes <= whole * share + whole * 2 / 8 + 0.1 * whole


@pytest.fixture
def checkpoint(tmp_path):
    build("olmoe").save_pretrained(tmp_path)
    return tmp_path


def test_a_checkpoint_that_lacks_an_expert_is_refused_and_gets_no_random_one(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    lost = [name for name in tensors if ".0.mlp.experts." in name and name.endswith("down_proj.weight")]
    save_file(
        {name: t for name, t in tensors.items() if name not in lost}, checkpoint / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(InputError, match=r"1 missing, such as model\.layers\.0"):
        load_model(ModelConfig(path=str(checkpoint), quantisation="int8"), device="cpu")


def test_experts_of_another_shape_are_refused(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    wrong = {
        n: t[:, :-1].contiguous() if ".0.mlp.experts." in n and "down_proj" in n else t for n, t in tensors.items()
    }
    save_file(wrong, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"of another shape, such as model\.layers\.0"):
        load_model(ModelConfig(path=str(checkpoint), quantisation="int8"), device="cpu")


@pytest.mark.parametrize("stored", ["fp8", "mxfp4", "bitsandbytes"])
def test_a_checkpoint_that_is_quantised_already_is_refused(checkpoint, tmp_path_factory, stored):
    folder = tmp_path_factory.mktemp("stored")
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": stored}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=f"is quantised as {stored} already"):
        check_model(ModelConfig(path=str(folder), quantisation="int8"))


def test_what_needs_whole_tensors_is_told_that_there_are_none():
    layer = find_moe_layers(quantised("olmoe", "int8"))[0]
    assert list(codes_of(layer.experts)) == list(layer.expert_stacks())
    with pytest.raises(InputError, match=r"kept as codes.*model\.quantisation=none"):
        layer.expert_tensors()

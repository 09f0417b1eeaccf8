"""A model that three processes hold gives what it gives in one, and each of them holds a third of it."""

from __future__ import annotations

import json
import subprocess
import sys

import causal_model
import numpy as np
import pandas as pd
import pytest
import torch
from families import build, made_equal
from joint_worker import FAMILIES, check_cause, losses_of_texts, measure
from paths import TESTS

from moe_ray.config.model import ModelConfig
from moe_ray.finetuning.adapter import expert_weights, save_adapter
from moe_ray.finetuning.adapter_tensors import hash_weights
from moe_ray.finetuning.trainable_experts import trainable_experts
from moe_ray.orchestration.cluster.model_process import ModelHolder
from moe_ray.storage.folder import Folder

# Several processes that each load torch.
pytestmark = pytest.mark.slow

SIZE = 3  # of which none divides 8 experts
HANGS_AFTER = 240  # seconds


def learn(model, folder):
    """An adapter that moves two experts by as much as is seen."""
    union_LE = np.zeros((1, causal_model.NUM_EXPERTS), dtype=bool)
    union_LE[0, [1, 7]] = True
    with trainable_experts(model, union_LE) as trainable:
        base_hash = hash_weights(expert_weights(model, list(trainable.parameters)))
        with torch.no_grad():
            for tensors in trainable.parameters.values():
                for tensor in tensors.values():
                    tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)))
        save_adapter(folder, trainable, base="causal", base_hash=base_hash, mask_hash="")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints, learned experts, and what the leader of three processes wrote."""
    folder = tmp_path_factory.mktemp("joint")
    for family in FAMILIES:
        build(family).save_pretrained(folder / family)
    made_equal("olmoe").save_pretrained(folder / "copies")
    causal_model.build("causal").save_pretrained(folder / "causal")
    causal_model.tokenizer().save_pretrained(folder / "causal")
    learn(causal_model.build("causal"), folder / "adapter")
    command = [sys.executable, str(TESTS / "joint_worker.py"), str(folder)]
    workers = [
        subprocess.Popen([*command, str(rank), str(SIZE)], stderr=subprocess.PIPE, text=True) for rank in range(SIZE)
    ]
    said = []
    try:
        said.append(workers[0].communicate(timeout=HANGS_AFTER)[1])
    finally:
        for worker in workers:
            worker.kill()
        said += [worker.communicate()[1] for worker in workers[1:]]
    assert workers[0].returncode == 0, "\n".join(said)
    return folder


@pytest.fixture(scope="module")
def told(folder):
    return json.loads((folder / "told.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def holder(folder):
    return ModelHolder(ModelConfig(path=str(folder / "causal")), 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_losses_and_answers_are_those_of_one_process_under_masks_too(told, family):
    expected = measure(build(family))
    assert any(
        row != natural for row, natural in zip(expected["masked losses"], expected["natural losses"], strict=True)
    )
    for name, values in expected.items():
        if "losses" in name or name == "weights":
            np.testing.assert_allclose(np.array(told[family][name]), np.array(values), atol=1e-5, rtol=0)
        else:
            assert told[family][name] == values, name


def test_each_process_holds_its_part_before_and_after_a_pass(told):
    assert told["share"] == [pytest.approx(1 / SIZE, abs=0.05)] * 2


def test_learned_experts_are_in_force_inside_a_context_and_gone_after_it(told, folder, holder):
    assert told["base"] == pytest.approx(losses_of_texts(holder), abs=1e-5)
    with holder.with_adapter(Folder.open(str(folder / "adapter"))):
        repaired = losses_of_texts(holder)
    assert told["repaired"] == pytest.approx(repaired, abs=1e-5)
    assert repaired != pytest.approx(told["base"], abs=1e-2)
    assert told["base"] == told["base again"] == told["base at last"]


def test_equal_experts_are_told_from_others_over_processes(told):
    assert [told[family]["are copies"] for family in FAMILIES] == [False] * len(FAMILIES)
    assert told["copies"]["are copies"]
    assert not told["are copies"]


def test_the_causal_check_finds_what_it_finds_in_one_process(told, holder):
    expected = check_cause(holder.model, holder.tokenizer)
    assert told["verdict"] == expected["verdict"] == "causal"
    assert told["cause answers"] == expected["cause answers"]
    found, wanted = (pd.DataFrame(part["effects"]) for part in (told, expected))
    pd.testing.assert_frame_equal(found, wanted, check_dtype=False, atol=1e-5)


def test_a_pass_with_gradients_is_refused_before_the_others_begin_it(told):
    assert "was run with gradients" in told["with gradients"]


def test_after_a_pass_that_broke_no_other_one_is_begun(told):
    assert len(told["broken"]) == 2
    for said in told["broken"]:
        assert "broke off" in said
        assert "no room for 7 bytes;" in said
        assert "set capture.tokens_per_forward" in said

"""Adapters and checkpoints of a training that are damaged, foreign or lie: the same as before, or a sentence."""

from __future__ import annotations

import json
import shutil
import struct

import pytest
import torch
from damage import ODD_JSON, damaged, of_other_types, refusal_of
from families import batch_masks, build, state_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from training_runs import BATCHES, CONFIG, EXPERTS

from moe_ray.errors import InputError
from moe_ray.finetuning.adapter import apply_adapter, expert_weights, load_adapter, save_adapter
from moe_ray.finetuning.adapter_files import HEADER, TENSORS
from moe_ray.finetuning.adapter_tensors import hash_weights
from moe_ray.finetuning.checkpoint import load_checkpoint, save_checkpoint, steps_done
from moe_ray.finetuning.trainable_experts import trainable_experts
from moe_ray.finetuning.trainer import MaskedTrainer

pytestmark = pytest.mark.slow
many = settings(max_examples=150, suppress_health_check=list(HealthCheck), database=None)


@pytest.fixture(scope="module")
def trainer():
    model = build("olmoe")
    masks = batch_masks(model, EXPERTS)
    with trainable_experts(model, masks.union) as trainable:
        yield MaskedTrainer(model, trainable, BATCHES, masks, CONFIG, pad_id=0, seed=0)


@pytest.fixture(scope="module")
def checkpoint(trainer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    with pytest.raises(KeyboardInterrupt):
        trainer.run(lambda report: (save_checkpoint(trainer, folder), stop()) if report.step == 1 else None)
    return folder


def stop():
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter of the model as it is, which is what it is about here."""
    folder, model = tmp_path_factory.mktemp("adapter"), build("olmoe")
    masks = batch_masks(model, EXPERTS)
    base_hash = hash_weights(expert_weights(model, list(masks.union_experts)))
    with trainable_experts(model, masks.union) as trainable:
        save_adapter(folder, trainable, base="tiny", base_hash=base_hash, mask_hash=masks.digest())
    return folder


@pytest.fixture
def copy(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    return tmp_path


def rewritten(folder, change):
    """The adapter with its weights changed, and nothing said of them in the header, as of earlier versions."""
    tensors = load_file(folder / TENSORS)
    save_file(change(tensors) or tensors, folder / TENSORS)
    header = json.loads((folder / HEADER).read_text())
    for name in ("dtypes", "weights_hash"):
        del header[name]
    (folder / HEADER).write_text(json.dumps(header))


@many
@given(st.data())
def test_adapters(adapter, tmp_path_factory, data):
    copy = tmp_path_factory.mktemp("damaged")
    name = data.draw(st.sampled_from([TENSORS, HEADER]))
    for file in (TENSORS, HEADER):
        shutil.copy(adapter / file, copy)
    whole = (adapter / name).read_bytes()
    changes = damaged(whole) if name == TENSORS else st.one_of(damaged(whole), of_other_types(whole))
    (copy / name).write_bytes(data.draw(changes))
    model, before = build("olmoe"), load_adapter(adapter)[1]
    said = refusal_of(lambda: apply_adapter(model, copy))
    if said is None:
        learned = load_adapter(copy)[1]
        assert hash_weights(learned) == hash_weights({part: before[part] for part in learned})
    else:
        assert len(said) < 1000
        assert "adapter" in said or str(copy) in said


def test_no_field_of_the_header_has_a_value_that_is_not_understood(copy):
    header, model = json.loads((copy / HEADER).read_text()), build("olmoe")
    for field in [*header, "routers", "quantisation"]:
        for value in ODD_JSON:
            (copy / HEADER).write_text(json.dumps(header | {field: value}))
            said = refusal_of(lambda: apply_adapter(model, copy))
            assert said is None or len(said) < 1000, (field, value)


@many
@given(st.data())
def test_checkpoints(checkpoint, trainer, tmp_path_factory, data):
    copy = tmp_path_factory.mktemp("damaged")
    shutil.copytree(checkpoint, copy, dirs_exist_ok=True)
    name = data.draw(st.sampled_from(["training.json", "training.safetensors"]))
    whole = (copy / name).read_bytes()
    changes = damaged(whole) if name.endswith("tensors") else st.one_of(damaged(whole), of_other_types(whole))
    (copy / name).write_bytes(data.draw(changes))
    said = refusal_of(lambda: (steps_done(copy), load_checkpoint(trainer, copy)))
    assert said is None or ("training" in said and len(said) < 1000)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_no_model_can_use_are_refused(copy, value):
    def change(tensors):
        next(iter(tensors.values()))[0, 0] = value

    rewritten(copy, change)
    model = build("olmoe")
    before = state_of(model)
    with pytest.raises(InputError, match=r"has infinite or undefined weights, .*train again"):
        apply_adapter(model, copy)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(model).items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: {**tensors, "0.7.gate_up_proj": torch.zeros(1)}, "'0.7.gate_up_proj' is none of them"),
        (lambda tensors: {**tensors, "more": torch.zeros(1)}, "'more' is none of them"),
        (lambda tensors: {key: value for key, value in tensors.items() if key[:3] != "1.0"}, "L01_E00 is missing"),
        (lambda tensors: {key: value for key, value in tensors.items() if "down" not in key}, "has shapes"),
        (lambda tensors: {key: value[:-1].contiguous() for key, value in tensors.items()}, "has shapes"),
        (lambda tensors: {key: value.to(torch.int32) for key, value in tensors.items()}, "is of type I32"),
    ],
)
def test_other_tensors_than_the_header_lists_are_refused(copy, change, said, monkeypatch):
    rewritten(copy, change)
    # By the head of the file: no weight is read.
    monkeypatch.setattr("moe_ray.finetuning.adapter.read_weights", stop)
    with pytest.raises(InputError, match=said):
        apply_adapter(build("olmoe"), copy)


def test_another_type_than_recorded_is_refused(copy):
    tensors = {key: value.bfloat16() for key, value in load_file(copy / TENSORS).items()}
    save_file(tensors, copy / TENSORS)
    with pytest.raises(InputError, match=r"is of type BF16, adapter\.json says F32"):
        load_adapter(copy)


def test_other_weights_than_the_header_was_written_with_are_refused(copy):
    tensors = load_file(copy / TENSORS)
    next(iter(tensors.values()))[0, 0] += 1
    save_file(tensors, copy / TENSORS)
    with pytest.raises(InputError, match=r"the weights are not those that adapter\.json was written with"):
        load_adapter(copy)


def test_an_adapter_of_an_earlier_version_is_read(copy):
    before = load_adapter(copy)[1]
    rewritten(copy, lambda tensors: None)
    assert hash_weights(load_adapter(copy)[1]) == hash_weights(before)


@pytest.mark.parametrize("shape", [[1 << 40], [1 << 20, 1 << 20], [-1]])
def test_a_head_that_claims_more_than_the_file_holds_is_refused(copy, shape):
    size = 4
    for number in shape:
        size *= number
    head = json.dumps({"0.1.gate_up_proj": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    (copy / TENSORS).write_bytes(struct.pack("<Q", len(head)) + head)
    with pytest.raises(InputError, match=r"experts\.safetensors is damaged or foreign"):
        load_adapter(copy)


def test_a_checkpoint_of_other_shapes_is_refused_and_changes_nothing(checkpoint, trainer, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    tensors = load_file(checkpoint / "training.safetensors")
    before = [parameter.detach().clone() for parameter in trainer.trainable.all_parameters()]
    for change in (
        {"0.weight": tensors["0.weight"][:-1]},
        {"0.weight": tensors["0.weight"].bfloat16()},
        {"0.exp_avg": tensors["0.exp_avg"][:1]},
        {"99.weight": tensors["0.weight"]},
        {"0.step": torch.ones(3)},
        {"0.exp_avg": tensors["0.exp_avg"] * float("inf")},
    ):
        save_file(
            {key: value.contiguous().clone() for key, value in (tensors | change).items()},
            tmp_path / "training.safetensors",
        )
        with pytest.raises(InputError, match=r"training\.safetensors.*remove the run's `finetune` folder"):
            load_checkpoint(trainer, tmp_path)
    after = trainer.trainable.all_parameters()
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))

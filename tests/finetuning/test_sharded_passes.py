"""Training over a base that FSDP2 shards over 2 and 4 workers: losses and weights of one process, a part of its memory."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from families import build, state_of
from paths import TESTS
from safetensors.torch import load_file
from sharded_worker import EXPERTS, PLAIN, VARIANTS, Killed, Variant, activations_computed_again, folder_of, train
from training_runs import changes, union_of

from moe_ray.config.model import ModelConfig
from moe_ray.errors import InputError
from moe_ray.finetuning.adapter import load_adapter
from moe_ray.models.loading import load_model
from moe_ray.models.sharded_storage import check_sharded

# Several processes that each load torch.
pytestmark = pytest.mark.slow

# Sums of gradients in another order, which AdamW's first steps turn into more.
WEIGHT_TOLERANCE = 1e-5
HANGS_AFTER = 240  # seconds


def whole_model(folder, variant=PLAIN):
    """A model of the family, as one process has it."""
    return load_model(ModelConfig(path=str(folder / folder_of(variant)), dtype=variant.dtype), device="cpu")


@pytest.fixture(scope="module", params=[2, 4])
def done(request, tmp_path_factory):
    """How many workers trained, and the folder in which they wrote what they saw."""
    folder = tmp_path_factory.mktemp("sharded")
    for family in {"olmoe", *(variant.family for variant in VARIANTS.values())}:
        build(family).save_pretrained(folder / folder_of(Variant(family)))
    for name in ("checkpoint", "checkpoint-of-one"):
        (folder / name).mkdir()
    with pytest.raises(Killed):
        train(whole_model(folder), "masked", 0, 1, request.param, folder / "checkpoint-of-one", dies=True)
    command = [sys.executable, str(TESTS / "sharded_worker.py"), str(folder)]
    workers = [
        subprocess.Popen([*command, str(rank), str(request.param)], stderr=subprocess.PIPE, text=True)
        for rank in range(request.param)
    ]
    try:
        for worker in workers:
            _, said = worker.communicate(timeout=HANGS_AFTER)
            assert worker.returncode == 0, said
    finally:
        for worker in workers:
            worker.kill()
    return request.param, folder


def told(done):
    """What each worker saw."""
    workers, folder = done
    return [json.loads((folder / f"told-{rank}.json").read_text(encoding="utf-8")) for rank in range(workers)]


def alone(done, name):
    """The model, losses and learned weights of one process."""
    workers, folder = done
    model = whole_model(folder)
    return model, *train(model, name, 0, 1, workers)


@pytest.mark.parametrize("name", ["masked", "natural", "stopping"])
def test_losses_and_learned_weights_are_those_of_one_process(done, name):
    workers, folder = done
    _, losses, learned = alone(done, name)
    for rank, seen in enumerate(told(done)):
        assert seen[name] == pytest.approx(losses, abs=1e-5)
        written = load_file(folder / f"{name}-{rank}.safetensors")
        assert written.keys() == learned.keys()
        for key, tensor in written.items():
            torch.testing.assert_close(tensor, learned[key], atol=WEIGHT_TOLERANCE, rtol=0)
    if name == "stopping":
        assert len(losses) == 2 * (-(-len(EXPERTS) // workers)), (
            "a loss that never falls ends it after two of six epochs"
        )


def test_what_was_learned_is_in_the_sharded_model_and_nothing_else_moved(done):
    workers, folder = done
    expected = alone(done, "masked")[0].state_dict()
    model = whole_model(folder)
    before = state_of(model)
    for rank in range(workers):
        written = load_file(folder / f"model-{rank}.safetensors")
        for name, tensor in written.items():
            torch.testing.assert_close(tensor, expected[name], atol=WEIGHT_TOLERANCE, rtol=0)
        model.load_state_dict(written)
        assert changes(model, before) == (set(), union_of(EXPERTS))


def test_a_killed_run_goes_on_from_its_checkpoint_to_the_same_weights(done):
    _, folder = done
    for rank, seen in enumerate(told(done)):
        assert seen["resumed"] == pytest.approx(seen["masked"][1:], abs=1e-6)
        whole, resumed = (load_file(folder / f"{name}-{rank}.safetensors") for name in ("masked", "resumed"))
        assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_a_killed_run_goes_on_with_another_number_of_workers(done):
    workers, folder = done
    _, losses, learned = alone(done, "masked")
    assert sorted(path.name for path in (folder / "checkpoint").iterdir()) == [
        *(f"training-{rank:05d}-of-{workers:05d}.safetensors" for rank in range(workers)),
        "training.json",
    ]
    resumed_alone = train(whole_model(folder), "masked", 0, 1, workers, folder / "checkpoint")
    by_all = [
        (seen["resumed_from_one"], load_file(folder / f"resumed_from_one-{rank}.safetensors"))
        for rank, seen in enumerate(told(done))
    ]
    for losses_of, weights in [resumed_alone, *by_all]:
        assert losses_of == pytest.approx(losses[1:], abs=1e-5)
        for key, tensor in weights.items():
            torch.testing.assert_close(tensor, learned[key], atol=WEIGHT_TOLERANCE, rtol=0)


def test_each_worker_holds_the_optimiser_state_of_its_own_experts_only(done):
    workers, folder = done
    whole: list[int] = []
    train(whole_model(folder), "masked", 0, 1, workers, moments=whole)
    held = [seen["moments"][0] for seen in told(done)]
    assert sum(held) == whole[0]
    experts = len(union_of(EXPERTS))
    assert max(held) <= whole[0] * -(-experts // workers) / experts


@pytest.mark.parametrize("name", VARIANTS)
def test_other_types_and_families_and_activations_computed_again(done, name):
    workers, folder = done
    variant = VARIANTS[name]
    model = whole_model(folder, variant)
    with activations_computed_again(model, variant.checkpoints_activations):
        losses, learned = train(model, "masked", 0, 1, workers)
    for rank, seen in enumerate(told(done)):
        assert seen[name] == pytest.approx(losses, abs=1e-5)
        for key, tensor in load_file(folder / f"{name}-{rank}.safetensors").items():
            torch.testing.assert_close(tensor, learned[key], atol=WEIGHT_TOLERANCE, rtol=0)
        if variant.checkpoints_activations:
            assert seen[f"{name} ran"] == 2 * seen["qwen3_moe ran"], "each forward runs again in backward"


def test_each_worker_holds_its_part_of_the_base(done):
    assert [seen["share"] for seen in told(done)] == [pytest.approx(1 / done[0], abs=0.01)] * done[0]


def test_every_worker_hears_that_a_frozen_tensor_changed_in_one(done):
    seen = told(done)
    assert [worker["changed"] for worker in seen] == [0] * done[0]
    assert [worker["touched_here"] for worker in seen].count(True) == 1
    assert all("training changed" in worker["heard"] for worker in seen)


def test_rank_0_writes_an_adapter_of_whole_experts(done):
    _, folder = done
    learned = load_file(folder / "masked-0.safetensors")
    saved = load_adapter(folder / "adapter")[1]
    assert {(expert.layer, expert.expert) for expert in saved} == union_of(EXPERTS)
    for expert, tensors in saved.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, learned[f"{expert.layer}.{expert.expert}.{name}"])


def test_routers_do_not_train_over_shards(done):
    assert all("expected frozen" in worker["alternating"] for worker in told(done))


def test_a_model_that_was_not_sharded_is_refused():
    with pytest.raises(InputError, match=r"got a whole tensor, expected one that FSDP2 shards"):
        check_sharded(build("olmoe"))

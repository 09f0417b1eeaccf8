"""Killed and resumed equals uninterrupted (invariant 16), and a checkpoint of another run is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from families import batch_masks, build, state_of
from policies import ROUTINGS, config_of
from safetensors.torch import save_file
from torch import nn
from training_runs import BATCHES, CONFIG, EXPERTS

from moe_ray.errors import InputError
from moe_ray.finetuning import checkpoint
from moe_ray.finetuning.checkpoint import load_checkpoint, save_checkpoint, steps_done
from moe_ray.finetuning.tensor_files import read_tensors
from moe_ray.finetuning.trainable_experts import trainable_experts
from moe_ray.finetuning.trainer import MaskedTrainer

FAMILIES = ("olmoe", "deepseek_v3", "gpt_oss", "phimoe")


def run(model, *, folder=None, kill_at=None, resume=False, config=CONFIG, per_batch=EXPERTS, seed=0, **options):
    """Trains to the end, or saves a checkpoint at step `kill_at` and stops there; returns the reports."""
    masks = batch_masks(model, per_batch)
    with trainable_experts(model, masks.union) as trainable:
        trainer = MaskedTrainer(model, trainable, BATCHES, masks, config, pad_id=0, seed=seed, **options)
        if resume:
            load_checkpoint(trainer, folder)

        def after_step(report):
            if trainer.next_step == kill_at:
                save_checkpoint(trainer, folder)
                raise KeyboardInterrupt

        if kill_at is None:
            return trainer.run()
        with pytest.raises(KeyboardInterrupt):
            trainer.run(after_step)
        return []


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kill_at", [1, 3, 4])
def test_killed_and_resumed_equals_uninterrupted(family, kill_at, tmp_path):
    whole, killed, resumed = build(family), build(family), build(family)
    expected = run(whole)
    run(killed, folder=tmp_path, kill_at=kill_at)
    reports = run(resumed, folder=tmp_path, resume=True)
    assert [r.batch_idx for r in reports] == [r.batch_idx for r in expected[kill_at:]]
    assert [r.loss for r in reports] == [r.loss for r in expected[kill_at:]]
    assert all(torch.equal(tensor, state_of(resumed)[name]) for name, tensor in state_of(whole).items())


@pytest.mark.slow
@pytest.mark.parametrize("routing", ROUTINGS)
def test_under_every_policy_killed_and_resumed_equals_uninterrupted(routing, tmp_path):
    whole, resumed, config = build("olmoe"), build("olmoe"), config_of(routing)
    expected = run(whole, config=config)
    run(build("olmoe"), folder=tmp_path, kill_at=2, config=config)
    reports = run(resumed, folder=tmp_path, resume=True, config=config)
    assert [r.loss for r in reports] == [r.loss for r in expected[2:]]
    assert all(torch.equal(tensor, state_of(resumed)[name]) for name, tensor in state_of(whole).items())


def test_resuming_a_finished_run_trains_nothing(tmp_path):
    run(build("olmoe"), folder=tmp_path, kill_at=6)
    assert run(build("olmoe"), folder=tmp_path, resume=True) == []


def test_a_resumed_run_stops_early_where_the_whole_one_would(tmp_path):
    config = replace(CONFIG, epochs=5, patience=1)
    run(build("olmoe"), folder=tmp_path, kill_at=3, config=config, validate=lambda: 1.0)
    reports = run(build("olmoe"), folder=tmp_path, resume=True, config=config, validate=lambda: 2.0)
    assert [report.step for report in reports] == [3, 4, 5]


def test_resuming_a_schedule_goes_on_where_it_was(tmp_path):
    config = replace(CONFIG, schedule="cosine", warmup=0.3)
    expected = run(build("olmoe"), config=config)
    run(build("olmoe"), folder=tmp_path, kill_at=2, config=config)
    reports = run(build("olmoe"), folder=tmp_path, resume=True, config=config)
    assert [r.learning_rate for r in reports] == [r.learning_rate for r in expected[2:]]


def test_experts_that_never_trained_have_no_optimiser_state_after_resuming(tmp_path):
    run(build("olmoe"), folder=tmp_path, kill_at=1)
    model = build("olmoe")
    masks = batch_masks(model, EXPERTS)
    with trainable_experts(model, masks.union) as trainable:
        trainer = MaskedTrainer(model, trainable, BATCHES, masks, CONFIG, pad_id=0, seed=0)
        load_checkpoint(trainer, tmp_path)
        first = trainer.plan[0][0]
        assert len(trainer.optimizer.state) == 2 * len(EXPERTS[first])


def test_state_goes_to_each_parameters_own_device_and_never_all_to_one(tmp_path, monkeypatch):
    """The meta device stands for a second GPU: half of the experts are there."""
    run(build("olmoe"), folder=tmp_path, kill_at=3)
    model = build("olmoe")
    masks = batch_masks(model, EXPERTS)
    loaded_to = []

    def read(path, *, device="cpu", **options):
        loaded_to.append(device)
        return read_tensors(path, device=device, **options)

    monkeypatch.setattr(checkpoint, "read_tensors", read)
    with trainable_experts(model, masks.union) as trainable:
        for expert, tensors in trainable.parameters.items():
            if expert.layer == 1:
                trainable.parameters[expert] = {name: nn.Parameter(t.to("meta")) for name, t in tensors.items()}
        trainer = MaskedTrainer(model, trainable, BATCHES, masks, CONFIG, pad_id=0, seed=0)
        assert not trainer.optimizer.defaults["fused"]
        # Nothing can be copied back from there, which a second GPU could.
        monkeypatch.setattr(trainable, "write_back", lambda mask_LE: None)
        load_checkpoint(trainer, tmp_path)
        state = trainer.optimizer.state
        assert {parameter.device.type for parameter in state} == {"cpu", "meta"}
        for parameter, values in state.items():
            assert {name: value.device for name, value in values.items() if name != "step"} == {
                "exp_avg": parameter.device,
                "exp_avg_sq": parameter.device,
            }
            assert values["step"].device.type == "cpu"
    assert loaded_to == ["cpu"]


SHARED = replace(CONFIG, batches_per_step=2)


@pytest.fixture
def in_parts(tmp_path):
    """Writes a checkpoint after so many steps as two workers do, into a folder; gives how many experts each has state of."""

    def write(folder, kill_at):
        one = tmp_path / f"one-{kill_at}"
        for path in (one, folder):
            path.mkdir(exist_ok=True)
        run(build("olmoe"), folder=one, kill_at=kill_at, config=SHARED)
        held = []
        for rank in (1, 0):
            model = build("olmoe")
            masks = batch_masks(model, EXPERTS)
            with trainable_experts(model, masks.union) as trainable:
                options = {"pad_id": 0, "seed": 0, "rank": rank, "world_size": 2}
                trainer = MaskedTrainer(model, trainable, BATCHES, masks, SHARED, **options)
                load_checkpoint(trainer, one)
                held.append(len(trainer.optimizer.state) // 2)
                save_checkpoint(trainer, folder)
        return held

    return write


def test_parts_of_two_workers_are_one_checkpoint(tmp_path, in_parts):
    whole, resumed = build("olmoe"), build("olmoe")
    expected = run(whole, config=SHARED)
    assert in_parts(tmp_path / "parts", 3) == [4, 4]  # of eight experts
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == [
        "training-00000-of-00002.safetensors",
        "training-00001-of-00002.safetensors",
        "training.json",
    ]
    reports = run(resumed, folder=tmp_path / "parts", resume=True, config=SHARED)
    assert [r.loss for r in reports] == [r.loss for r in expected[3:]]
    assert all(torch.equal(tensor, state_of(resumed)[name]) for name, tensor in state_of(whole).items())


def test_a_checkpoint_without_one_of_its_parts_is_refused(tmp_path, in_parts):
    in_parts(tmp_path / "parts", 1)
    (tmp_path / "parts" / "training-00001-of-00002.safetensors").unlink()
    for read in (steps_done, lambda folder: run(build("olmoe"), folder=folder, resume=True, config=SHARED)):
        with pytest.raises(InputError, match=r"training-00001-of-00002\.safetensors is missing, one of 2 parts"):
            read(tmp_path / "parts")


def test_parts_of_two_steps_are_no_checkpoint(tmp_path, in_parts):
    in_parts(tmp_path / "parts", 3)
    in_parts(tmp_path / "older", 1)
    name = "training-00001-of-00002.safetensors"
    (tmp_path / "older" / name).replace(tmp_path / "parts" / name)
    with pytest.raises(InputError, match="got the state before step 1, expected that of 3"):
        run(build("olmoe"), folder=tmp_path / "parts", resume=True, config=SHARED)


def test_a_checkpoint_of_an_earlier_version_is_one_part_that_says_nothing_of_its_step(tmp_path):
    whole, resumed = build("olmoe"), build("olmoe")
    run(whole)
    run(build("olmoe"), folder=tmp_path, kill_at=3)
    state = json.loads((tmp_path / "training.json").read_text())
    del state["num_parts"]
    (tmp_path / "training.json").write_text(json.dumps(state))
    path = tmp_path / "training.safetensors"
    save_file(read_tensors(path, cure=""), path)
    run(resumed, folder=tmp_path, resume=True)
    assert all(torch.equal(tensor, state_of(resumed)[name]) for name, tensor in state_of(whole).items())


def test_no_pickle_is_written(tmp_path):
    run(build("olmoe"), folder=tmp_path, kill_at=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["training.json", "training.safetensors"]
    json.loads((tmp_path / "training.json").read_text())


def test_a_checkpoint_of_other_masks_is_refused(tmp_path):
    run(build("olmoe"), folder=tmp_path, kill_at=1)
    with pytest.raises(InputError, match="belongs to other masks"):
        run(build("olmoe"), folder=tmp_path, resume=True, per_batch={**EXPERTS, 3: [(0, 2)]})


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"config": replace(CONFIG, epochs=3)}, {"config": replace(CONFIG, batches_per_step=2)}]
)
def test_a_checkpoint_of_another_order_of_batches_is_refused(change, tmp_path):
    run(build("olmoe"), folder=tmp_path, kill_at=1)
    with pytest.raises(InputError, match="another order of batches"):
        run(build("olmoe"), folder=tmp_path, resume=True, **change)


def test_an_unfinished_checkpoint_is_refused(tmp_path):
    run(build("olmoe"), folder=tmp_path, kill_at=1)
    (tmp_path / "training.json").unlink()
    with pytest.raises(InputError, match="no training checkpoint"):
        run(build("olmoe"), folder=tmp_path, resume=True)


def test_writing_over_a_checkpoint_leaves_it_unfinished_until_the_end(tmp_path, monkeypatch):
    run(build("olmoe"), folder=tmp_path, kill_at=1)

    def fail(*args, **options):
        raise OSError("disk full")

    monkeypatch.setattr("moe_ray.finetuning.checkpoint.save_file", fail)
    model = build("olmoe")
    masks = batch_masks(model, EXPERTS)
    with trainable_experts(model, masks.union) as trainable:
        trainer = MaskedTrainer(model, trainable, BATCHES, masks, CONFIG, pad_id=0, seed=0)
        with pytest.raises(OSError, match="disk full"):
            save_checkpoint(trainer, tmp_path)
    assert not (tmp_path / "training.json").exists()

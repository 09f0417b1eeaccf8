"""A training that was ended goes on from the newest checkpoint in its folder, to the same weights."""

from __future__ import annotations

import pytest
import torch
from families import batch_masks, build, state_of
from text_batches import BATCHES, EXPERTS
from word_tokenizer import make_tokenizer

import moe_ray
from moe_ray.errors import InputError
from moe_ray.finetuning.kept_checkpoints import newest_checkpoint

SETTINGS = {"learning_rate": 1e-2, "schedule": "constant", "epochs": 3}


class StopsAt(moe_ray.Callback):
    def __init__(self, step: int) -> None:
        self.step = step
        self.begun: list[int] = []
        self.folders: list[str] = []

    def on_train_begin(self, trainer):
        self.begun.append(trainer.next_step)

    def on_epoch_end(self, trainer, reports):
        if trainer.next_step == self.step:
            trainer.stop()

    def on_checkpoint(self, trainer, folder):
        assert newest_checkpoint(folder.parent) == folder
        self.folders.append(folder.name)


def tune(checkpoints, watch, **settings):
    model = build("olmoe")
    masks = batch_masks(model, EXPERTS)
    moe_ray.fine_tune(
        model, make_tokenizer(), BATCHES, masks, checkpoints=checkpoints, callbacks=[watch], **SETTINGS | settings
    )
    return model


def test_a_training_that_was_ended_goes_on_to_the_weights_of_one_that_was_not(tmp_path):
    expected = state_of(tune(None, StopsAt(0)))
    first, second = StopsAt(2), StopsAt(0)
    assert not all(torch.equal(t, expected[n]) for n, t in state_of(tune(tmp_path / "kept", first)).items())
    assert all(torch.equal(t, expected[n]) for n, t in state_of(tune(tmp_path / "kept", second)).items())
    assert (first.begun, second.begun) == ([0], [2])
    assert first.folders == ["step_00000002"]
    assert second.folders == ["step_00000004", "step_00000006"]
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["step_00000006"]


def test_checkpoints_come_as_often_as_the_setting_says(tmp_path):
    watch = StopsAt(0)
    tune(tmp_path, watch, checkpoint_every=4)
    assert watch.folders == ["step_00000004", "step_00000006"]


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(tmp_path):
    tune(tmp_path, StopsAt(2))
    (tmp_path / "step_00000004").mkdir()
    assert newest_checkpoint(tmp_path).name == "step_00000002"
    assert newest_checkpoint(tmp_path / "nowhere") is None


def test_a_checkpoint_of_other_masks_is_refused(tmp_path):
    tune(tmp_path, StopsAt(2))
    model = build("olmoe")
    masks = batch_masks(model, EXPERTS | {4: [(0, 1)]})
    with pytest.raises(InputError, match="other masks"):
        moe_ray.fine_tune(model, make_tokenizer(), BATCHES, masks, checkpoints=tmp_path, **SETTINGS)

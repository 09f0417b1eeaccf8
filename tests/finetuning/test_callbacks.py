"""Code of one's own is called at the start of a training, after its steps and epochs, and at its end."""

from __future__ import annotations

import pytest
import torch
from families import batch_masks, build
from text_batches import BATCHES, EXPERTS
from word_tokenizer import make_tokenizer

from moe_ray.config.finetune import FinetuneConfig
from moe_ray.finetuning.callbacks import Callback
from moe_ray.finetuning.fine_tune import fine_tune

CONFIG = FinetuneConfig(epochs=2, learning_rate=1e-2, schedule="constant")


class Diary(Callback):
    """What was called, in order."""

    def __init__(self, stop_at: int = 0) -> None:
        self.said: list[tuple[str, object]] = []
        self.stop_at = stop_at

    def on_train_begin(self, trainer):
        self.said.append(("begin", trainer.next_step))

    def on_step_end(self, trainer, report):
        self.said.append(("step", report.step))
        if trainer.next_step == self.stop_at:
            trainer.stop()

    def on_epoch_end(self, trainer, reports):
        self.said.append(("epoch", [report.step for report in reports]))

    def on_train_end(self, trainer, reports):
        self.said.append(("end", len(reports)))


def tune(*callbacks):
    model = build("olmoe")
    tuned = fine_tune(model, make_tokenizer(), BATCHES, batch_masks(model, EXPERTS), config=CONFIG, callbacks=callbacks)
    return model, tuned


def test_each_step_epoch_and_end_is_told_once_and_in_order():
    diary = Diary()
    tune(diary)
    epochs = [("step", 0), ("step", 1), ("epoch", [0, 1]), ("step", 2), ("step", 3), ("epoch", [2, 3])]
    assert diary.said == [("begin", 0), *epochs, ("end", 4)]


def test_a_training_that_is_stopped_ends_after_the_step():
    diary = Diary(stop_at=3)
    _, tuned = tune(diary)
    assert len(tuned.reports) == 3
    assert diary.said[-2:] == [("step", 2), ("end", 3)]


def test_several_callbacks_are_told_and_one_that_does_nothing_changes_nothing():
    first, second = Diary(), Diary()
    watched, _ = tune(first, second)
    alone, _ = tune(Callback())
    assert first.said == second.said
    weights = [model.model.layers[0].mlp.experts.down_proj for model in (watched, alone)]
    assert torch.equal(*weights)


def test_what_a_callback_raises_ends_the_training():
    class Fails(Callback):
        def on_epoch_end(self, trainer, reports):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        tune(Fails())

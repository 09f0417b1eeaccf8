"""The last whole checkpoint of a training, on any storage."""

import pytest
import torch
from families import batch_masks, build
from training_runs import BATCHES, CONFIG, EXPERTS

from moe_ray.finetuning.checkpoint import CHECKPOINT_FILES, load_checkpoint
from moe_ray.finetuning.trainable_experts import trainable_experts
from moe_ray.finetuning.trainer import MaskedTrainer
from moe_ray.orchestration.jobs.training_checkpoints import StoredCheckpoints


@pytest.fixture
def trainer():
    model = build("olmoe")
    masks = batch_masks(model, EXPERTS)
    with trainable_experts(model, masks.union) as trainable:
        yield MaskedTrainer(model, trainable, BATCHES, masks, CONFIG, pad_id=0, seed=0)


def after(trainer, step):
    """The trainer as if it had done so many steps, with weights that say so."""
    trainer.next_step = step
    with torch.no_grad():
        for parameter in trainer.trainable.all_parameters():
            parameter.fill_(float(step))
    return trainer


def loaded(trainer, checkpoints):
    with checkpoints.latest() as folder:
        load_checkpoint(trainer, folder)
    return trainer.next_step, float(trainer.trainable.all_parameters()[0].flatten()[0].detach())


def test_there_is_none_before_the_first(folder):
    with StoredCheckpoints(folder).latest() as latest:
        assert latest is None


def test_the_last_one_is_kept_and_no_other(folder, trainer):
    checkpoints = StoredCheckpoints(folder)
    for step in (1, 2, 10):
        checkpoints.save(after(trainer, step))
    assert len(folder.names()) == 1
    assert loaded(after(trainer, 3), checkpoints) == (10, 10.0)


def test_one_that_was_not_finished_is_passed_over(folder, trainer):
    checkpoints = StoredCheckpoints(folder)
    checkpoints.save(after(trainer, 2))
    # Killed between the two files of the next one.
    (whole,) = folder.names()
    unfinished = folder.sub(whole.replace("2", "4"))
    unfinished.write_bytes(CHECKPOINT_FILES[0], b"half")
    assert loaded(after(trainer, 3), checkpoints) == (2, 2.0)


def test_a_finished_training_leaves_none(folder, trainer):
    checkpoints = StoredCheckpoints(folder)
    checkpoints.save(after(trainer, 2))
    checkpoints.delete()
    assert not folder.fs.exists(folder.path)

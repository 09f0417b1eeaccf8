"""What a trial trained is taken by a run with equal inputs, byte for byte as that would have trained it, and by no other."""

from pathlib import Path

import pytest
from families import batch_masks, build
from text_batches import BATCHES, EXPERTS
from word_tokenizer import make_tokenizer

from moe_ray.config.finetune import FinetuneConfig
from moe_ray.config.io import with_settings
from moe_ray.config.run import Config
from moe_ray.finetuning.adapter_files import ADAPTER_FILES, read_adapter_header
from moe_ray.finetuning.fine_tune import FineTuned, fine_tune
from moe_ray.finetuning.history import read_history
from moe_ray.storage.folder import Folder
from moe_ray.studies.kept_training import forget_training, keep_training, take_training, training_settings
from moe_ray.studies.trial import run_trial

CONFIG = FinetuneConfig(epochs=2, learning_rate=1e-2, schedule="constant")
INPUTS = {"masks": "abc", "finetune.epochs": 2, "finetune.batch_weights": ()}


@pytest.fixture
def trials(tmp_path):
    return Folder.open(str(tmp_path / "trials"))


@pytest.fixture
def out(tmp_path):
    return Folder.open(str(tmp_path / "out"))


@pytest.fixture
def kept(trials):
    """A trial's folder with the training of its model; another trial was trained before it in the same process."""
    model = build("olmoe")
    masks = batch_masks(model, EXPERTS)
    for name, config in (("other", FinetuneConfig(epochs=1, learning_rate=1e-1)), ("mine", CONFIG)):
        folder, inputs = trials.sub(name), INPUTS | {"finetune.epochs": config.epochs}

        def keep(adapter: Path, tuned: FineTuned, folder: Folder = folder, inputs: dict = inputs) -> None:
            keep_training(folder, inputs, adapter, tuned)

        run_trial(
            model, make_tokenizer(), BATCHES, masks, config=config, seed=3, measure=str, base="the/base", keep=keep
        )
    return trials.sub("mine")


def test_a_kept_training_is_byte_for_byte_what_training_gives(kept, trials, out, tmp_path):
    model = build("olmoe")
    tuned = fine_tune(
        model, make_tokenizer(), BATCHES, batch_masks(model, EXPERTS),
        config=CONFIG, seed=3, adapter=tmp_path / "trained", base="the/base",
    )  # fmt: skip
    notes = take_training(trials, INPUTS, out)
    for name in ADAPTER_FILES:
        assert out.read_bytes(name) == (tmp_path / "trained" / name).read_bytes()
    assert notes == {
        "trainable_parameters": tuned.trainable_parameters,
        "total_parameters": tuned.total_parameters,
        "frozen_parameters_changed": 0,
        "trained_by": "mine",
    }
    assert [step["loss"] for step in read_history(out)] == [report.loss for report in tuned.reports]


@pytest.mark.slow
@pytest.mark.parametrize("changed", [{"masks": "abd"}, {"finetune.epochs": 7}, {"validation": "x"}])
def test_a_training_of_other_inputs_is_not_taken(kept, trials, out, changed):
    assert take_training(trials, INPUTS | changed, out) is None
    assert out.names() == []


def test_a_forgotten_training_is_gone_and_what_the_trial_measured_is_not(kept, trials, out):
    kept.write_json("record.json", {"value": 1.0})
    forget_training(kept)
    assert kept.names() == ["record.json"]
    assert take_training(trials, INPUTS, out) is None
    assert read_adapter_header(trials.sub("other"))  # and the other trial's is untouched


def test_a_resumed_training_is_not_kept_since_its_history_lacks_steps(kept, trials, tmp_path):
    folder = trials.sub("resumed")
    nothing = FineTuned(reports=(), trainable_parameters=1, total_parameters=2, frozen_parameters_changed=0)
    keep_training(folder, INPUTS, kept.path, nothing)
    assert folder.names() == []


@pytest.mark.parametrize(
    ("settings", "is_another"),
    [
        ({"finetune.learning_rate": 1e-5}, True),
        ({"finetune.num_workers": 3}, True),  # as many batches a step, since batches_per_step is 0
        ({"finetune.num_workers": 0}, False),
        ({"finetune.checkpoint_every": 5}, False),
        ({"rounds.max_rounds": 3}, False),
        ({"identify.top_k": 3}, False),  # the masks are an input of their own
    ],
)
def test_what_settings_a_training_depends_on(settings, is_another):
    config = with_settings(Config(), {"finetune.num_workers": 1})
    assert (training_settings(with_settings(config, settings)) != training_settings(config)) is is_another

"""Benign fine-tuning: safe examples only, the learned experts only, and every bit is back."""

from __future__ import annotations

import pytest
import torch
from families import batch_masks, build, state_of
from text_batches import BATCHES, EXPERTS
from training_runs import changes
from word_tokenizer import make_tokenizer

from moe_ray.attacks.benign_fine_tuning import benign_batches, benignly_fine_tuned
from moe_ray.config.finetune import FinetuneConfig
from moe_ray.errors import InputError

pytestmark = pytest.mark.slow

EXAMPLES = [example for batch in BATCHES for example in batch.examples]


def tuned(model, **changed):
    options = {"steps": 3, "rows": 2, "learning_rate": 1e-2, "seed": 0} | changed
    return benignly_fine_tuned(
        model, make_tokenizer(), EXAMPLES, batch_masks(model, EXPERTS), FinetuneConfig(), **options
    )


def test_the_learned_experts_move_and_nothing_else():
    model = build("olmoe")
    before = state_of(model)
    with tuned(model) as notes:
        others, moved = changes(model, before)
        assert others == set()
        assert moved
        assert moved <= {pair for pairs in EXPERTS.values() for pair in pairs}
        assert notes["last_loss"] < notes["first_loss"]


def test_all_weights_are_back_bit_for_bit():
    model = build("olmoe")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with tuned(model):
        pass
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_every_step_has_safe_examples_only_and_begins_again_where_there_are_too_few():
    batches = benign_batches(EXAMPLES, steps=3, rows=2)
    assert [batch.batch_idx for batch in batches] == [0, 1, 2]
    assert [[example.id for example in batch.examples] for batch in batches] == [["a", "c"]] * 3
    assert [len(batch.examples) for batch in benign_batches(EXAMPLES, steps=1, rows=9)] == [2]


def test_without_a_safe_example_it_is_refused():
    unsafe = [example for example in EXAMPLES if example.label == "unsafe"]
    with pytest.raises(InputError, match="no safe training prompt with a target"):
        benign_batches(unsafe, steps=1, rows=2)

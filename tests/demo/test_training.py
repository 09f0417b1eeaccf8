"""How the tiny model learns: from answers alone, with experts that tell kinds of request apart."""

import math

import pytest
import torch
from families import build

from moe_ray.demo import training
from moe_ray.demo.examples import base_training_records
from moe_ray.demo.training import (
    IGNORED_LABEL,
    NO_GROUP,
    TrainingSequence,
    chat_sequence,
    collate,
    soft_mutual_information,
    training_batches,
    training_losses,
)

BATCH = collate(
    [
        TrainingSequence([5, 6, 7], [8, 9], 0),
        TrainingSequence([10], [11, 12, 13, 2], 1),
        TrainingSequence([14, 15], [16], NO_GROUP),
    ],
    pad_token_id=0,
)


def test_a_batch_learns_the_answers_and_nothing_else():
    assert BATCH.input_ids_NS.tolist() == [[5, 6, 7, 8, 9], [10, 11, 12, 13, 2], [14, 15, 16, 0, 0]]
    assert BATCH.attention_mask_NS.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    no = IGNORED_LABEL
    assert BATCH.labels_NS.tolist() == [[no, no, no, 8, 9], [no, 11, 12, 13, 2], [no, no, 16, no, no]]
    assert BATCH.groups_N.tolist() == [0, 1, NO_GROUP]


def test_the_language_loss_is_that_of_the_whole_models_logits():
    model = build("olmoe")
    with torch.no_grad():
        loss, _ = training_losses(model, BATCH)
        logits = model(BATCH.input_ids_NS, attention_mask=BATCH.attention_mask_NS).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), BATCH.labels_NS[:, 1:].flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_step_lowers_the_loss_and_tells_the_groups_further_apart():
    model = build("olmoe").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loss, information = training_losses(model, BATCH)
    (loss - information).backward()
    optimizer.step()
    with torch.no_grad():
        later_loss, later_information = training_losses(model, BATCH)
    assert later_loss - later_information < loss - information
    assert later_loss < loss


def test_plain_text_has_no_group_that_routing_could_tell_apart():
    model = build("olmoe")
    chats = collate([TrainingSequence([5, 6, 7], [8, 9], 0), TrainingSequence([10], [11, 12, 13, 2], 1)], 0)
    with torch.no_grad():
        assert training_losses(model, BATCH)[1].item() == pytest.approx(
            training_losses(model, chats)[1].item(), abs=1e-6
        )


@pytest.mark.parametrize(
    ("probs", "nats"),
    [
        ([[1.0, 0.0], [0.0, 1.0]], math.log(2)),  # each group has its expert
        ([[0.5, 0.5], [0.5, 0.5]], 0.0),  # routing says nothing of the group
        ([[1.0, 0.0], [1.0, 0.0]], 0.0),  # one expert does it all
        ([[0.75, 0.25], [0.25, 0.75]], math.log(2) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25)),
    ],
)
def test_mutual_information_is_that_of_expert_and_group(probs, nats):
    got = soft_mutual_information(torch.tensor(probs), torch.tensor([0, 1]))
    assert got.item() == pytest.approx(nats, abs=1e-6)


def test_every_record_is_learned_once_before_any_comes_again(tiny_tokenizer, monkeypatch):
    records = base_training_records()[:8]
    monkeypatch.setattr(training, "base_training_records", lambda: records)
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for batch in training_batches(tiny_tokenizer, batch_size=3, num_steps=8, generator=generator):
        assert (batch.groups_N >= 0).tolist() == [True, True, True, False]
        drawn += [
            tuple(row[mask == 1].tolist())
            for row, mask in zip(batch.input_ids_NS, batch.attention_mask_NS, strict=True)
        ][:3]
    sequences = [chat_sequence(tiny_tokenizer, record, 0) for record in records]
    every = {(*sequence.context, *sequence.learned) for sequence in sequences}
    assert len(every) == 8
    passes = [drawn[:8], drawn[8:16], drawn[16:]]
    assert [set(one) for one in passes] == [every] * 3
    assert passes[0] != passes[1]

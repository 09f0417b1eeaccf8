import logging
from dataclasses import replace

import pytest
import torch
from families import batch_masks, build, rows, shared
from training_runs import BATCHES, CONFIG, EXPERTS
from transformers import OlmoeConfig, OlmoeForCausalLM

from moe_ray.config.finetune import FinetuneConfig
from moe_ray.experts import Expert, masks_from_experts
from moe_ray.finetuning.low_rank import low_rank
from moe_ray.finetuning.output_movement import watched_steps
from moe_ray.finetuning.trainable_experts import trainable_experts, whole_experts
from moe_ray.finetuning.trainer import MaskedTrainer
from moe_ray.models.moe_layers import find_moe_layers

NATURAL = replace(CONFIG, routing="natural", weight_decay=0.0, epochs=4)


def trained(model, config, *, per_batch=EXPERTS, batches=BATCHES, parametrisation=whole_experts):
    masks = batch_masks(model, per_batch)
    with trainable_experts(model, masks.union, parametrisation=parametrisation) as trainable:
        return MaskedTrainer(model, trainable, batches, masks, config, pad_id=0, seed=0).run()


@pytest.fixture(scope="module")
def real_width():
    """One layer as wide as OLMoE-1B-7B's, with two of its experts and the same initialisation."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=64, hidden_size=2048, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=16,
        num_key_value_heads=16, num_experts=2, num_experts_per_tok=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return OlmoeForCausalLM(config).eval()


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "is_too_large"), [(3e-3, True), (FinetuneConfig().learning_rate, False)])
def test_a_rate_for_a_tiny_model_is_warned_of_at_real_width_and_the_default_is_not(
    real_width, rate, is_too_large, caplog
):
    start = {name: tensor.clone() for name, tensor in real_width.state_dict().items()}
    masks = masks_from_experts({0: [Expert(0, 0), Expert(0, 1)]}, layers=(0,), num_experts=2)
    config = FinetuneConfig(learning_rate=rate, epochs=3)
    with caplog.at_level(logging.WARNING), trainable_experts(real_width, masks.union) as trainable:
        reports = MaskedTrainer(real_width, trainable, {0: rows((9, 6), (7, 8))}, masks, config, pad_id=0, seed=0).run()
    real_width.load_state_dict(start)
    assert len(caplog.messages) == is_too_large
    assert [bool(report.warning) for report in reports] == [is_too_large, False, False]
    moved = [report.output_movement[0] for report in reports]
    assert moved[1] > 5 if is_too_large else max(moved) < 0.3
    if is_too_large:
        assert "lower finetune.learning_rate" in caplog.text
        assert "train in layer 0" in caplog.text


@pytest.mark.parametrize("routing", ["natural", "masked"])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_movement_is_that_of_what_the_experts_that_train_give_for_tokens_they_received(family, routing):
    config = replace(NATURAL, routing=routing, epochs=1)
    model, base = build(family), shared(family)
    masks = batch_masks(model, {0: [(0, 1), (0, 5)]})
    probes = []
    with trainable_experts(model, masks.union) as trainable:
        trainer = MaskedTrainer(model, trainable, {0: BATCHES[7]}, masks, config, pad_id=0, seed=0)
        take = trainer._movement.take
        trainer._movement.take = lambda batch: (probes.append(batch.forwards[0].probe), take(batch))
        (report,) = trainer.run()
    (probe,) = probes
    is_trained = torch.isin(probe.index_TK, torch.tensor([1, 5]))
    assert (is_trained & (probe.weights_TK > 0)).any()

    def given(model):
        with torch.no_grad():
            weights = probe.weights_TK.masked_fill(~is_trained, 0.0)
            return find_moe_layers(model)[0].experts(probe.hidden_TH, probe.index_TK, weights)

    expected = (given(model) - given(base)).norm() / given(base).norm()
    assert report.output_movement == pytest.approx((expected.item(), 0.0), rel=1e-4)
    assert expected > 0


def test_movement_is_watched_in_the_first_steps_only():
    reports = trained(build("olmoe"), NATURAL)
    assert [len(report.output_movement) for report in reports] == [2] * 4 + [0] * 8
    assert not any(report.warning for report in reports[4:])


def test_low_rank_differences_start_where_the_model_is_and_move_its_outputs():
    reports = trained(build("olmoe"), NATURAL, parametrisation=low_rank(2))
    assert 0 < max(reports[0].output_movement) < max(reports[3].output_movement)


def test_watching_changes_no_weight(monkeypatch):
    watched, unwatched = build("olmoe"), build("olmoe")
    trained(watched, NATURAL)
    monkeypatch.setattr("moe_ray.finetuning.trainer.watched_steps", lambda *_, **__: 0)
    trained(unwatched, NATURAL)
    assert all(map(torch.equal, watched.state_dict().values(), unwatched.state_dict().values()))


@pytest.mark.parametrize(
    ("num_steps", "schedule", "warmup", "expected"),
    [
        (100, "constant", 0.0, 4),
        (3, "constant", 0.0, 3),
        (100, "linear", 0.0, 5),
        (1000, "constant", 0.1, 28),  # (1 + 2 + ... + 28) / 100 is 4.06
    ],
)
def test_as_many_steps_are_watched_as_come_to_four_at_the_full_rate(num_steps, schedule, warmup, expected):
    assert watched_steps(num_steps, schedule=schedule, warmup=warmup) == expected

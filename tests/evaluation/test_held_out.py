"""A held-out evaluation in one process: every example once per kind of routing, and its figures against the base's."""

from dataclasses import replace

import pytest
from families import batch_masks, shared
from held_out_examples import CONFIG, held_out

from moe_ray.errors import InputError
from moe_ray.evaluation.held_out import NO_BATCH, evaluate_held_out
from moe_ray.models.loss import text_losses
from moe_ray.models.token_budget import TokenBudget

MASKS = {0: [(0, 1), (0, 2), (0, 5), (1, 3)], 1: [(0, 0), (0, 7), (0, 3)]}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Short neutral texts, and both kinds of routing."""
    path = tmp_path_factory.mktemp("neutral") / "texts.txt"
    path.write_text("w1 w2 w3\n\nw9 w8 w7 w6\n")
    return replace(CONFIG, max_new_tokens=2, neutral_file=str(path))


@pytest.fixture(scope="module")
def before(config, tokenizer):
    model = shared("olmoe")
    return evaluate_held_out(model, tokenizer, held_out(), config, batch_masks(model, MASKS))


def test_answers_are_in_the_examples_order_natural_routing_first(before):
    frame = before.to_frame()
    assert frame["id"].tolist() == held_out()["id"].tolist() * 2
    assert frame["routing"].tolist() == ["natural"] * 10 + ["masked"] * 10


def test_routing_is_counted_of_natural_prompts_once(before):
    assert sorted(before.routing.in_batch_idx.tolist()) == list(range(10))


@pytest.mark.slow
def test_the_same_model_is_no_change(before, config, tokenizer):
    model = shared("olmoe")
    again = evaluate_held_out(model, tokenizer, held_out(), config, batch_masks(model, MASKS), before=before)
    assert again.change["unsafe_refusal_rate"]["value"] == again.change["target_loss"]["value"] == 0
    assert again.change["neutral_loss"]["value"] == 0
    assert again.metrics["first_token_kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert (again.metrics["first_token_kl"]["n"], before.metrics["first_token_kl"]) == (5, None)
    assert again.metrics["routing_drift"]["mean_absolute_change"]["value"] == 0


def test_neutral_losses_are_those_of_the_files_texts(before, tokenizer):
    assert before.neutral.equals(
        text_losses(shared("olmoe"), tokenizer, ["w1 w2 w3", "w9 w8 w7 w6"], budget=TokenBudget(40))
    )


def test_examples_without_a_batch_have_no_figures_per_batch(config, tokenizer):
    frame = held_out().assign(batch_idx=NO_BATCH)
    assert (
        evaluate_held_out(shared("olmoe"), tokenizer, frame, replace(config, routing="natural")).metrics["per_batch"]
        == {}
    )


def test_progress_ends_with_all_rows_done(config, tokenizer):
    seen = []
    evaluate_held_out(
        shared("olmoe"), tokenizer, held_out(), replace(config, routing="natural"), progress=lambda *at: seen.append(at)
    )
    assert seen == [(5, 10), (10, 10)]


def test_answers_of_other_examples_are_no_base_to_compare_with(before, config, tokenizer):
    model = shared("olmoe")
    with pytest.raises(InputError, match="different examples"):
        evaluate_held_out(model, tokenizer, held_out(8), config, batch_masks(model, MASKS), before=before)

"""The tool on models with a known answer: what is planted is found and called the cause, and nothing is in the controls."""

from __future__ import annotations

import pytest
from paths import ROOT

from moe_ray import pipeline
from moe_ray.config.model import ModelConfig
from moe_ray.demo.examples import embedded_records
from moe_ray.models.loading import load_model, load_tokenizer
from moe_ray.organisms import OrganismRecipe, build_embedded, read_truth
from moe_ray.organisms.recovery import recovery
from moe_ray.prompts.batches import assemble_batches
from moe_ray.prompts.examples import records_to_examples

PLAIN = {"max_batches": 0, "leave_one_out": 0, "curve": 0, "forced": False, "generate": False}


def find(folder, rule, column):
    """Attribution or routing on one batch of each category, and the causal check on held-out prompts."""
    config = ModelConfig(path=str(folder))
    model, tokenizer = load_model(config, device="cpu"), load_tokenizer(config)
    every = assemble_batches(records_to_examples(embedded_records("train")), seed=0).batches
    batches = list({batch.category: batch for batch in every}.values())
    scores = [rule] if rule == "attribution" else []
    counts = pipeline.capture(model, tokenizer, batches, scores=scores)
    found = pipeline.identify(counts, rule=rule, permutations=0, resamples=0)
    ablation = pipeline.ablate(
        *(model, tokenizer, batches, found.masks, found.risk),
        held_out=records_to_examples(embedded_records("test")), ranked_by=column, **PLAIN,
    )  # fmt: skip
    return found.masks, {batch.batch_idx: batch.category for batch in batches}, ablation


@pytest.mark.slow
def test_attribution_finds_the_planted_experts_and_they_are_called_the_cause(tiny_model_path):
    masks, categories, ablation = find(tiny_model_path, "attribution", "attribution_diff")
    found = recovery(read_truth(tiny_model_path), masks, categories)
    assert found["recall"] >= 0.9
    assert found["precision"] >= 0.8
    assert ablation.verdict == "causal"
    assert (ablation.batches["verdict"] == "causal").mean() >= 0.8


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(("rule", "column"), [("attribution", "attribution_diff"), ("risk_diff", "risk_diff")])
@pytest.mark.parametrize("kind", ["spread", "attention"])
def test_nothing_is_called_the_cause_in_the_controls(kind, rule, column):
    folder = build_embedded(ROOT / ".cache", recipe=OrganismRecipe(kind=kind))
    _, _, ablation = find(folder, rule, column)
    assert ablation.verdict != "causal"
    assert (ablation.batches["verdict"] == "causal").sum() == 0

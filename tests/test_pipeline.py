"""The five functions without Ray are the pieces that a run is made of, called one by one."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from counting_alone import count_batches
from families import build, hooks_left, state_of
from prompt_tokens import by_prompt_tokens
from word_tokenizer import TEMPLATE, make_tokenizer

import moe_ray
from moe_ray.config.capture import CaptureConfig
from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.config.finetune import FinetuneConfig
from moe_ray.config.identify import IdentifyConfig
from moe_ray.config.prompts import PromptsConfig
from moe_ray.errors import InputError
from moe_ray.evaluation.evaluate import answer_examples, assign_reference_batches
from moe_ray.evaluation.metrics import paired_changes, summarise
from moe_ray.finetuning.fine_tune import fine_tune
from moe_ray.identification.identify import identify
from moe_ray.identification.selection import select
from moe_ray.models.loss import text_losses
from moe_ray.models.token_budget import TokenBudget
from moe_ray.prompts.batches import assemble_batches
from moe_ray.prompts.example_tables import batches_to_frame, examples_to_frame
from moe_ray.prompts.neutral_texts import neutral_texts
from moe_ray.prompts.splits import split_examples
from moe_ray.run_directory import open_run

UNSAFE, SAFE = ("how", "thanks"), ("are", "you", "fine")
SIZES = {"safe_per_batch": 3, "unsafe_per_batch": 3}
# What they are trained towards here is one word.
SETTINGS = {**SIZES, "allow_complying_targets": True}
FINE_TUNE = FinetuneConfig(epochs=2, learning_rate=1e-2, schedule="constant")
EVALUATE = EvaluateConfig(max_new_tokens=4)
CAPTURE = CaptureConfig(max_new_tokens=4)


def some_examples() -> list[moe_ray.Example]:
    """Unsafe prompts say other words than safe ones, in one of two categories, half of them without a target."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "prompt": " ".join(rng.choice(SAFE if label == "safe" else UNSAFE, size=3 + number % 4)),
            "label": label,
            "category": ("fraud", "theft")[number % 2],
            "target": "fine thanks" if label == "safe" or number % 3 else None,
        }
        for number in range(20)
        for label in ("safe", "unsafe")
    ]
    return moe_ray.read_examples(pd.DataFrame(rows))


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(chat_template=TEMPLATE, eos_token="<end>")


@pytest.fixture(scope="module")
def prompts():
    return moe_ray.prepare(some_examples(), seed=3, refusal="thanks thanks", **SETTINGS)


@pytest.fixture(scope="module")
def counts(prompts, tokenizer):
    return moe_ray.capture(build("olmoe"), tokenizer, prompts.batches, config=CAPTURE)


@pytest.fixture(scope="module")
def found(counts):
    return moe_ray.identify(counts, permutations=500, resamples=20)


def test_prepare_splits_and_groups_as_a_run_does(prompts):
    splits = split_examples(some_examples(), test_fraction=0.25, seed=3)
    expected = assemble_batches(splits["train"], seed=3, **SIZES)
    without = [replace(e, target=None) for batch in prompts.batches for e in batch.examples]
    assert without == [replace(e, target=None) for batch in expected.batches for e in batch.examples]
    assert [example.id for example in prompts.test] == [example.id for example in splits["test"]]


def test_unsafe_examples_without_a_target_get_the_refusal(prompts):
    given = {example.id: example.target for example in some_examples()}
    used = [e for batch in prompts.batches for e in batch.examples] + list(prompts.test)
    assert any(given[example.id] is None for example in used)
    assert all(example.target == (given[example.id] or "thanks thanks") for example in used)


def test_safe_examples_without_a_target_get_the_models_own_answer(tokenizer, caplog):
    examples = [replace(example, target=None) for example in some_examples()]
    too_long = [replace(e, id=f"{e.id} long", messages=({"role": "user", "content": "how " * 70},)) for e in examples]
    given = [*examples, *(e for e in too_long if e.label == "safe")]
    model, lenient = build("olmoe"), CaptureConfig(max_bad_share=0.9)
    with caplog.at_level(logging.WARNING):
        prepared = moe_ray.prepare(
            given, model=model, tokenizer=tokenizer, own_answer_tokens=3, capture_config=lenient, **SETTINGS
        )
    assert "test examples cannot be answered and are left out" in caplog.text
    trained = [e for batch in prepared.batches for e in batch.examples]
    is_long = [example.id.endswith("long") for example in trained]
    assert any(is_long)
    assert is_long == [example.target is None for example in trained]
    assert not any(example.id.endswith("long") for example in prepared.test)
    used = [*(example for example in trained if example.target is not None), *prepared.test]
    config = EvaluateConfig(max_new_tokens=3)
    safe = [example for example in used if example.label == "safe"]
    frame = examples_to_frame(safe).assign(batch_idx=-1)
    answers = answer_examples(model, tokenizer, frame, config)
    assert answers["answer"].tolist() == [example.target for example in safe]
    assert answers["ended"].tolist() == [example.target_complete for example in safe]


def test_capture_counts_what_the_rows_alone_give(prompts, counts, tokenizer):
    expected = count_batches(build("olmoe"), tokenizer, prompts.batches, rows_per_forward=2)
    of_prompts = counts.take(counts.role == "prompt")
    assert np.array_equal(of_prompts.counts_NLE, expected.counts_NLE)
    assert (counts.role == "response").sum() == len(expected)
    assert counts.weights_NLE is not None
    plain = moe_ray.capture(
        build("olmoe"), tokenizer, prompts.batches, generate=False, identify_config=by_prompt_tokens()
    )
    assert plain.to_frame().equals(expected.to_frame())
    assert plain.weights_NLE is None


def test_a_capture_warns_where_most_of_the_models_own_answers_to_unsafe_prompts_refuse(
    prompts, tokenizer, caplog, monkeypatch
):
    monkeypatch.setattr("moe_ray.evaluation.own_answers.is_refusal", lambda text: True)
    with caplog.at_level(logging.WARNING):
        moe_ray.capture(build("olmoe"), tokenizer, prompts.batches[:1], config=CAPTURE)
    assert "3 of the 3 answers that the model itself gives to unsafe prompts are worded as refusals" in caplog.text


def test_identify_is_the_risk_table_and_the_selection_of_a_run(counts, found):
    config = IdentifyConfig(permutations=500, resamples=20)
    risk = identify(counts, config)
    pd.testing.assert_frame_equal(found.risk, risk)
    assert found.masks.digest() == select(risk, config).digest()
    assert found.certainty["batch_idx"].tolist() == list(found.masks.batch_idx)


@pytest.mark.slow
def test_fine_tune_learns_what_a_worker_learns(prompts, found, tokenizer, tmp_path):
    model = build("olmoe")
    other = copy.deepcopy(model)
    tuned = moe_ray.fine_tune(
        model, tokenizer, prompts.batches, found.masks, config=FINE_TUNE, adapter=tmp_path / "adapter"
    )
    expected = fine_tune(other, tokenizer, prompts.batches, found.masks, config=FINE_TUNE)
    assert tuned.trainable_parameters == expected.trainable_parameters
    assert tuned.frozen_parameters_changed == 0
    there, base = state_of(other), state_of(build("olmoe"))
    assert all(torch.equal(tensor, there[name]) for name, tensor in state_of(model).items())
    assert not all(torch.equal(tensor, base[name]) for name, tensor in there.items())
    again = build("olmoe")
    with moe_ray.adapter_applied(again, tmp_path / "adapter"):
        assert all(torch.equal(tensor, there[name]) for name, tensor in state_of(again).items())


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["natural", ("natural", "masked", "union")])
def test_evaluate_gives_the_answers_and_figures_of_a_run(prompts, found, tokenizer, routing):
    model, config = build("olmoe"), replace(EVALUATE, routing=routing)
    evaluated = moe_ray.evaluate(
        model, tokenizer, prompts.test, batches=prompts.batches, masks=found.masks, config=config
    )
    frame = examples_to_frame(prompts.test)
    frame["batch_idx"] = assign_reference_batches(frame, batches_to_frame(prompts.batches))
    answers = answer_examples(model, tokenizer, frame, config, found.masks).drop(columns="place")
    pd.testing.assert_frame_equal(evaluated.answers, answers)
    neutral = text_losses(model, tokenizer, neutral_texts(), budget=TokenBudget(8192))
    assert evaluated.metrics == summarise(answers, neutral=neutral)
    assert evaluated.change is None
    assert hooks_left(model) == 0


def test_what_the_model_cannot_be_asked_is_not_trained(prompts, found, tokenizer, caplog):
    of_batch = prompts.batches[0].examples
    too_long = replace(of_batch[0], id="long", target=None, messages=({"role": "user", "content": "how " * 70},))
    batches = [replace(prompts.batches[0], examples=(*of_batch, too_long)), *prompts.batches[1:]]
    config = replace(FINE_TUNE, epochs=1)
    model, expected = build("olmoe"), build("olmoe")
    moe_ray.fine_tune(model, tokenizer, batches, found.masks, config=config)
    assert "1 of 25 examples cannot be asked and are not trained: 'long'" in caplog.text
    moe_ray.fine_tune(expected, tokenizer, prompts.batches, found.masks, config=config)
    there = state_of(expected)
    assert all(torch.equal(tensor, there[name]) for name, tensor in state_of(model).items())


@pytest.mark.slow
def test_what_changed_is_compared_with_the_model_before(prompts, found, tokenizer):
    model = build("olmoe")
    before = moe_ray.evaluate(model, tokenizer, prompts.test, config=EVALUATE)
    moe_ray.fine_tune(model, tokenizer, prompts.batches, found.masks, config=FINE_TUNE)
    after = moe_ray.evaluate(model, tokenizer, prompts.test, config=EVALUATE, before=before)
    expected = paired_changes(before.answers, after.answers, neutral_before=before.neutral, neutral_after=after.neutral)
    assert after.change == {**expected, "per_batch": {}}
    assert after.metrics["target_loss"]["value"] < before.metrics["target_loss"]["value"]
    assert after.metrics["routing_drift"]["largest_change"]["value"] != 0
    assert before.metrics["per_batch"] == {}


@pytest.mark.slow
def test_small_blocks_give_the_same_answers(prompts, tokenizer):
    model = build("olmoe")
    one, many = (
        moe_ray.evaluate(model, tokenizer, prompts.test, max_new_tokens=4, tokens_per_forward=size)
        for size in (8192, 40)
    )
    assert one.answers["answer"].tolist() == many.answers["answer"].tolist()
    assert one.answers["id"].tolist() == many.answers["id"].tolist() == [example.id for example in prompts.test]
    assert np.array_equal(one.routing.counts_NLE, many.routing.counts_NLE)


def test_masked_routing_needs_batches(prompts, found, tokenizer):
    with pytest.raises(InputError, match="give `batches` and `masks`"):
        moe_ray.evaluate(build("olmoe"), tokenizer, prompts.test, masks=found.masks, routing="masked")


# Settings


def test_a_keyword_is_a_setting_of_the_section_and_wins_over_its_object(counts):
    config = IdentifyConfig(top_k=2, permutations=0, resamples=0)
    assert moe_ray.identify(counts, config=config, top_k=1).config == replace(config, top_k=1)
    assert moe_ray.identify(counts, permutations=0, resamples=0, roles=["prompt"]).config.roles == ("prompt",)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"treshold": 0.1}, "treshold: no setting of IdentifyConfig; did you mean 'threshold'"),
        ({"qqqq": 1}, "expected some of alpha, compiled, correction, "),
        ({"top_k": 0}, "identify.top_k: got 0"),
    ],
)
def test_a_wrong_setting_is_refused(counts, settings, said):
    with pytest.raises(InputError, match=said):
        moe_ray.identify(counts, **settings)


def test_pairs_that_a_judge_must_choose_are_refused():
    with pytest.raises(InputError, match=r"let a run find them \(moe-ray prepare\)"):
        moe_ray.prepare(some_examples(), config=PromptsConfig(keep_pairs="jailbroken"))


# What cannot be used


def test_a_batch_that_lost_a_label_gets_no_mask(counts, caplog):
    batches = sorted(set(counts.batch_idx.tolist()))
    rest = counts.take((counts.batch_idx != batches[0]) | (counts.label == "safe"))
    with caplog.at_level(logging.WARNING):
        found = moe_ray.identify(rest, permutations=0, resamples=0)
    assert found.masks.batch_idx == tuple(batches[1:])
    assert f"batches [{batches[0]}] have response tokens of one label only" in caplog.text
    with pytest.raises(InputError, match="has response tokens of both labels"):
        moe_ray.identify(counts.take(counts.label == "safe"))


# Progress


@pytest.mark.slow
def test_progress_is_told_to_a_callback(prompts, found, tokenizer):
    told: dict[str, list[tuple[int, int]]] = {"capture": [], "fine_tune": [], "evaluate": []}

    def to(name):
        return lambda done, total: told[name].append((done, total))

    model = build("olmoe")
    moe_ray.capture(
        model, tokenizer, prompts.batches, progress=to("capture"), config=replace(CAPTURE, tokens_per_forward=40)
    )
    moe_ray.evaluate(model, tokenizer, prompts.test, progress=to("evaluate"), max_new_tokens=1, tokens_per_forward=30)
    moe_ray.fine_tune(
        model, tokenizer, prompts.batches, found.masks, progress=to("fine_tune"), config=replace(FINE_TUNE, epochs=1)
    )
    totals = {"capture": 6 * len(prompts.batches), "fine_tune": len(prompts.batches), "evaluate": len(prompts.test)}
    for name, calls in told.items():
        done = [call[0] for call in calls]
        assert len(done) > 1
        assert done == sorted(set(done))
        assert calls[-1] == (totals[name], totals[name])


def test_a_bar_is_shown_where_it_is_asked_for(prompts, tokenizer, capsys):
    moe_ray.capture(build("olmoe"), tokenizer, prompts.batches, config=CAPTURE)
    assert capsys.readouterr().err == ""
    moe_ray.capture(build("olmoe"), tokenizer, prompts.batches, config=CAPTURE, progress=True)
    total = 6 * len(prompts.batches)
    assert "capture: 100%" in (shown := capsys.readouterr().err)
    assert f"{total}/{total}" in shown


# What is printed


def test_results_print_as_one_line(prompts, counts, found, tokenizer):
    evaluated = moe_ray.evaluate(build("olmoe"), tokenizer, prompts.test, config=EVALUATE)
    num = len(prompts.batches)
    assert repr(prompts) == f"Prompts({num} batches, {len(prompts.assembly.left_over)} left over, 0 validation and {len(prompts.test)} test examples)"  # fmt: skip # noqa: E501
    assert repr(found).startswith(f"Identification({num} batches, ")
    assert repr(found).endswith(f"{found.masks!r})")
    assert repr(evaluated).startswith(f"Evaluation({len(prompts.test)} answers, unsafe refused 0%, safe refused 0%")
    assert all("\n" not in repr(value) for value in (prompts, counts, found, evaluated, prompts.assembly))


def test_tables_have_a_row_each(prompts, found):
    table = prompts.to_frame()
    assert len(table) == 6 * len(prompts.batches) + len(prompts.test)
    assert table["batch_idx"].notna().sum() == 6 * len(prompts.batches)
    assert table.loc[table["batch_idx"].isna(), "split"].eq("test").all()
    risk = found.to_frame()
    assert risk["is_selected"].sum() == found.masks.masks_BLE.sum()
    chosen = risk[risk["is_selected"]].groupby("batch_idx").size()
    assert chosen.to_dict() == {batch: len(experts) for batch, experts in found.masks.selected.items() if experts}


def test_open_run_is_the_run_directorys():
    assert moe_ray.open_run is open_run
    with pytest.raises(InputError, match="give the run_dir of a run"):
        moe_ray.open_run("memory://nothing/here")


@pytest.mark.slow
def test_rules_that_rank_by_scores_take_one_capture_and_no_model(prompts, tokenizer):
    batches = [
        replace(batch, examples=tuple(replace(example, response="fine thanks") for example in batch.examples))
        for batch in prompts.batches
    ]
    counts = moe_ray.capture(build("olmoe"), tokenizer, batches, scores=["attribution", "gate", "reap", "refusal"])
    for rule in ("attribution", "gate", "gate_refuse", "reap"):
        found = moe_ray.identify(counts, rule=rule, permutations=500, resamples=20)
        assert found.risk["p"].notna().all()
        assert min(len(experts) for experts in found.masks.selected.values()) > 0
    with pytest.raises(InputError, match=r"capture.scores=\[attribution\]"):
        moe_ray.identify(replace(counts, attribution_NLE=None), rule="attribution")

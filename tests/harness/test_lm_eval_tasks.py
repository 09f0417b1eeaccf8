"""lm-eval on a model in memory, on a task of four rows in a file."""

from __future__ import annotations

import pytest
import torch
from families import build
from harness_tasks import lm_eval_task, needs_lm_eval
from word_tokenizer import make_tokenizer

from moe_ray.config.harness import HarnessConfig
from moe_ray.harness.lm_eval_tasks import lm_eval_scores
from moe_ray.harness.tasks import HarnessTask
from moe_ray.models.loss import target_losses
from moe_ray.models.token_budget import TokenBudget
from moe_ray.models.tokenization import TokenizedRow

pytestmark = [pytest.mark.slow, needs_lm_eval, pytest.mark.filterwarnings("default")]


def scores(model, tmp_path, **settings):
    task = HarnessTask(harness="lm_eval", name=lm_eval_task(tmp_path / "task"))
    tokenizer = make_tokenizer(pad_token="<pad>", eos_token="<end>", bos_token="<start>")
    return lm_eval_scores(model, tokenizer, task, HarnessConfig(**settings)), tokenizer


def test_every_sample_has_its_score_and_it_is_that_of_the_model_as_it_is_now(tmp_path):
    model = build("olmoe")
    (table, samples), tokenizer = scores(model, tmp_path)
    assert list(table.columns) == ["task", "metric", "sample", "value"]
    assert table["metric"].unique().tolist() == ["acc"]
    assert table["sample"].tolist() == ["0", "1", "2", "3"]
    assert [sample["sample"] for sample in samples] == ["0", "1", "2", "3"]
    rows = [
        TokenizedRow(tokenizer("how are you")["input_ids"], tokenizer(word, add_special_tokens=False)["input_ids"])
        for word in ("fine", "thanks")
    ]
    good, bad = target_losses(model, rows, budget=TokenBudget(64), pad_id=0)
    assert table["value"].iloc[0] == float(good < bad)


def test_other_weights_in_the_same_object_give_other_scores(tmp_path):
    model = build("olmoe")
    (first, _), _ = scores(model, tmp_path)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    (second, _), _ = scores(model, tmp_path)
    assert (first["value"] != second["value"]).any()


def test_a_limit_takes_the_first_samples(tmp_path):
    (table, _), _ = scores(build("olmoe"), tmp_path, limit=2)
    assert table["sample"].tolist() == ["0", "1"]


def test_it_draws_no_bars_of_its_own(tmp_path, capsys):
    scores(build("olmoe"), tmp_path)
    assert capsys.readouterr().err == ""

"""A split is fitted on the dense model's own answers, and measured on others."""

from __future__ import annotations

import math

import pytest
import torch
from dense_checkpoints import make_dense, make_tokenizer

from moe_ray.demo.examples import embedded_records
from moe_ray.models.tokenization import TokenizedRow, encode_prompt
from moe_ray.prompts.neutral_texts import neutral_texts
from moe_ray.upcycling.calibration import embedded_prompts, nats_per_token, own_answers


def test_every_fifth_prompt_is_held_out_and_answers_are_the_models_own():
    dense, tokenizer = make_dense(max_position_embeddings=512), make_tokenizer()
    prompts = [[{"role": "user", "content": f"number {number}"}] for number in range(11)]
    fitted_on, held_out = own_answers(dense, tokenizer, prompts)
    encoded = [encode_prompt(tokenizer, messages) for messages in prompts]
    assert [row.prompt_ids for row in held_out] == [encoded[4], encoded[9]]
    assert [row.prompt_ids for row in fitted_on] == [encoded[n] for n in (0, 1, 2, 3, 5, 6, 7, 8, 10)]
    row = fitted_on[0]
    ids = torch.tensor([row.prompt_ids + row.answer_ids])
    with torch.no_grad():
        greedy = dense(ids).logits[0, len(row.prompt_ids) - 1 : -1].argmax(-1)
    assert greedy.tolist() == row.answer_ids


def test_embedded_prompts_are_of_both_labels_and_all_categories():
    by_text = {record["prompt"]: record for record in embedded_records("train")}
    chosen = [by_text[message["content"]] for (message,) in embedded_prompts()]
    assert {record["label"] for record in chosen} == {"safe", "unsafe"}
    assert {record["category"] for record in chosen} == {record["category"] for record in by_text.values()}


@pytest.mark.slow
@torch.no_grad()
def test_nats_per_token_are_of_neutral_text_and_of_the_answers_alone():
    dense, tokenizer = make_dense(max_position_embeddings=1024), make_tokenizer()
    row = TokenizedRow([5, 6, 7], [8, 9])
    found = nats_per_token(dense, tokenizer, [row])
    log_p = dense(torch.tensor([[5, 6, 7, 8, 9]])).logits[0].log_softmax(-1)
    assert found.answers == pytest.approx(-(log_p[2, 8] + log_p[3, 9]).item() / 2, abs=1e-5)
    losses, tokens = 0.0, 0
    for text in neutral_texts():
        ids = tokenizer(text)["input_ids"]
        log_p = dense(torch.tensor([ids])).logits[0].log_softmax(-1)
        losses -= log_p[:-1].gather(1, torch.tensor(ids[1:])[:, None]).sum().item()
        tokens += len(ids) - 1
    assert found.neutral == pytest.approx(losses / tokens, abs=1e-4)
    assert math.isnan(nats_per_token(dense, tokenizer, []).answers)

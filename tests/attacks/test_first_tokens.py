"""Log-probabilities of an answer's first token."""

from __future__ import annotations

import pytest
import torch
from families import build
from word_tokenizer import make_tokenizer

from moe_ray.attacks.first_tokens import affirmation, affirmative_tokens, first_log_probs
from moe_ray.errors import InputError

PROMPTS = [[5, 6, 7], [8, 9, 5, 6, 7], [6]]


def test_each_prompt_gets_what_it_would_alone_whatever_shares_its_pass():
    model = build("olmoe")
    together = first_log_probs(model, PROMPTS, pad_id=0)
    for row, prompt in enumerate(PROMPTS):
        with torch.inference_mode():
            alone = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        assert torch.allclose(together[row], alone, atol=1e-4)


def test_affirmation_is_the_likeliest_of_the_tokens():
    model = build("olmoe")
    log_probs = first_log_probs(model, PROMPTS, pad_id=0)
    assert torch.equal(affirmation(model, PROMPTS, [8, 9], pad_id=0), log_probs[:, [8, 9]].amax(dim=1))


def test_affirmations_that_begin_alike_count_once_and_those_without_tokens_not_at_all():
    assert affirmative_tokens(make_tokenizer(), ["fine thanks", "fine", " ", "thanks"]) == [8, 9]
    with pytest.raises(InputError, match=r"attack\.affirmations: got \[' '\]"):
        affirmative_tokens(make_tokenizer(), [" "])

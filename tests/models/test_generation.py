"""Generated responses: greedy or sampled, each example with its own random numbers."""

from collections import Counter

import pytest
import torch

from moe_ray.config.model import ModelConfig
from moe_ray.models.generation import _RowNoise, example_seed, generate_answers, generate_responses
from moe_ray.models.loading import load_model, load_tokenizer

PROMPTS = ["How do I bake bread?", "Tell me", "What is the best way to water plants in a very hot summer?"]


@pytest.fixture(scope="module")
def tiny(tiny_model_path):
    config = ModelConfig(path=str(tiny_model_path))
    return load_model(config, device="cpu"), load_tokenizer(config)


@pytest.fixture(scope="module")
def prompts(tiny):
    return [tiny[1](text)["input_ids"] for text in PROMPTS]


def test_greedy_responses_are_those_of_evaluation(tiny, prompts):
    responses = generate_responses(*tiny, prompts, max_new_tokens=12)
    answers = generate_answers(*tiny, prompts, max_new_tokens=12, rows_per_forward=3)
    assert [(response.text, response.ended) for response in responses] == answers
    for response in responses:
        assert response.ended == (response.ids[-1] == tiny[1].eos_token_id)
        assert len(response.ids) <= 12


def test_a_sampled_response_does_not_depend_on_its_neighbours(tiny, prompts):
    seeds = [example_seed(0, 0, place) for place in range(3)]
    together = generate_responses(*tiny, prompts, max_new_tokens=12, temperature=1.0, seeds=seeds)
    turned = generate_responses(*tiny, prompts[::-1], max_new_tokens=12, temperature=1.0, seeds=seeds[::-1])
    alone = generate_responses(*tiny, prompts[:1], max_new_tokens=12, temperature=1.0, seeds=seeds[:1])
    assert [r.ids for r in turned[::-1]] == [r.ids for r in together]
    assert alone[0].ids == together[0].ids
    others = generate_responses(*tiny, prompts, max_new_tokens=12, temperature=1.0, seeds=seeds[::-1])
    assert [r.ids for r in others] != [r.ids for r in together]


def test_sampling_draws_from_the_softmax():
    logits = torch.tensor([[1.0, 0.0, -1.0]]).expand(4000, 3)
    noise = _RowNoise(range(4000), temperature=2.0, device=torch.device("cpu"))
    drawn = Counter(noise(None, logits).argmax(dim=1).tolist())
    expected = torch.softmax(logits[0] / 2.0, dim=0).tolist()
    for token, share in enumerate(expected):
        # Four standard errors of a share of 4000 draws.
        assert drawn[token] / 4000 == pytest.approx(share, abs=4 * (share * (1 - share) / 4000) ** 0.5)

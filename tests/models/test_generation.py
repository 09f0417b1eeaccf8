"""Generated responses: greedy or sampled, each example with its own random numbers."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from thinking_templates import DEEPSEEK_R1, GPT_OSS, QWEN3, thinking_tokenizer

from moe_ray.config.model import ModelConfig
from moe_ray.models.generation import _RowNoise, example_seed, generate_answers, generate_responses
from moe_ray.models.loading import load_model, load_tokenizer
from moe_ray.models.token_budget import TokenBudget

PROMPTS = ["How do I bake bread?", "Tell me", "What is the best way to water plants in a very hot summer?"]


@pytest.fixture(scope="module")
def tiny(untrained_model_path):
    config = ModelConfig(path=str(untrained_model_path))
    return load_model(config, device="cpu"), load_tokenizer(config)


@pytest.fixture(scope="module")
def prompts(tiny):
    return [tiny[1](text)["input_ids"] for text in PROMPTS]


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 80, 8192])
def test_answers_are_the_greedy_responses_in_the_prompts_order(tiny, prompts, tokens):
    expected = [generate_responses(*tiny, [prompt], max_new_tokens=12)[0] for prompt in prompts]
    answers = generate_answers(*tiny, prompts, max_new_tokens=12, budget=TokenBudget(tokens))
    assert answers == expected
    assert len({answer.text for answer in answers}) == len(prompts)
    assert all(len(response.ids) <= 12 for response in expected)


@pytest.mark.slow
def test_a_response_ends_with_the_first_token_that_ends_one(tiny, prompts, monkeypatch):
    model, tokenizer = tiny
    whole = generate_responses(model, tokenizer, prompts, max_new_tokens=12)
    end = next(token for token in whole[0].ids[1:] if token != whole[0].ids[0])
    monkeypatch.setattr(model.generation_config, "eos_token_id", [end])
    for response, before in zip(generate_responses(model, tokenizer, prompts, max_new_tokens=12), whole, strict=True):
        assert response.ended == (end in before.ids or before.ended)
        assert response.ids == before.ids[: before.ids.index(end) + 1 if end in before.ids else None]
    assert generate_answers(model, tokenizer, prompts[:1], max_new_tokens=12, budget=TokenBudget(8192))[0].ended


@pytest.mark.slow
def test_a_sampled_response_does_not_depend_on_its_neighbours(tiny, prompts):
    seeds = [example_seed(0, 0, index) for index in range(3)]
    together = generate_responses(*tiny, prompts, max_new_tokens=12, temperature=1.0, seeds=seeds)
    turned = generate_responses(*tiny, prompts[::-1], max_new_tokens=12, temperature=1.0, seeds=seeds[::-1])
    alone = generate_responses(*tiny, prompts[:1], max_new_tokens=12, temperature=1.0, seeds=seeds[:1])
    assert [r.ids for r in turned[::-1]] == [r.ids for r in together]
    assert alone[0].ids == together[0].ids
    others = generate_responses(*tiny, prompts, max_new_tokens=12, temperature=1.0, seeds=seeds[::-1])
    assert [r.ids for r in others] != [r.ids for r in together]


@pytest.mark.slow
def test_sampling_draws_from_the_softmax():
    logits = torch.tensor([[1.0, 0.0, -1.0]]).expand(4000, 3)
    noise = _RowNoise(range(4000), temperature=2.0, device=torch.device("cpu"))
    drawn = Counter(noise(None, logits).argmax(dim=1).tolist())
    expected = torch.softmax(logits[0] / 2.0, dim=0).tolist()
    for token, share in enumerate(expected):
        # Four standard errors of a share of 4000 draws.
        assert drawn[token] / 4000 == pytest.approx(share, abs=4 * (share * (1 - share) / 4000) ** 0.5)


def says(tokenizer, text: str):
    """A model that goes on with this text, whatever the prompt."""
    said = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])

    def generate(input_ids, **options):
        return torch.cat([input_ids, said.expand(len(input_ids), -1)], dim=1)

    return SimpleNamespace(
        device=torch.device("cpu"), generate=generate, generation_config=SimpleNamespace(eos_token_id=None)
    )


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (QWEN3, "<think>\nhm\n</think>\n\nNo.<|im_end|>"),
        (DEEPSEEK_R1, "hm\n</think>\n\nNo.<｜end▁of▁sentence｜>"),
        (GPT_OSS, "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>No.<|return|>"),
    ],
)
def test_a_response_is_told_from_the_thought_before_it(template, said):
    tokenizer = thinking_tokenizer(template)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "?"}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    (response,) = generate_responses(says(tokenizer, said), tokenizer, [ids], max_new_tokens=99)
    assert (response.text, response.thought, response.ended, response.is_unclosed) == ("No.", "hm", True, False)
    assert tokenizer.decode(response.ids) == said
    assert tokenizer.decode(response.ids[response.num_thought :], skip_special_tokens=True) == "No."
    (cut,) = generate_responses(says(tokenizer, said[: said.index("hm") + 2]), tokenizer, [ids], max_new_tokens=99)
    assert (cut.text, cut.thought, cut.is_unclosed, cut.num_thought) == ("", "hm", True, len(cut.ids))

"""Facts about the tiny model's tokenizer."""

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moe_ray.demo.examples import embedded_records

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How do I kill a Python process?"},
    {"role": "assistant", "content": "Press Ctrl and C."},
]


@pytest.fixture(scope="module")
def tokenizer(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> PreTrainedTokenizerFast:
    """As users get it: written and read again."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", ["How do I?", " two  spaces ", "naïve 你好 🙂", "line\nbreak"])
def test_any_text_survives_a_round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_pad_token_is_not_the_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_prompt_with_generation_prompt_opens_the_whole_chat(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = tokenizer.apply_chat_template(CHAT, return_dict=False)
    prompt = tokenizer.apply_chat_template(CHAT[:2], add_generation_prompt=True, return_dict=False)
    assert whole[: len(prompt)] == prompt
    assert tokenizer.decode(whole[len(prompt) :]) == "Press Ctrl and C." + tokenizer.eos_token


def test_assistant_mask_covers_the_answer_and_its_end(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    learned = [i for i, kept in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if kept]
    assert tokenizer.decode(learned) == "Press Ctrl and C." + tokenizer.eos_token


def test_prompts_and_answers_are_short(tokenizer: PreTrainedTokenizerFast) -> None:
    for record in [*embedded_records("train"), *embedded_records("test")]:
        chat = [{"role": "user", "content": record["prompt"]}]
        assert len(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)) <= 28
        assert len(tokenizer(record["response"])["input_ids"]) <= 24

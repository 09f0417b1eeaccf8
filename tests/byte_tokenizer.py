"""A tokenizer of bytes, and what is counted of messages where the template's own tokens are not."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from moe_ray.models.tokenization import encode_prompt, encode_row


def counted_words(tokenizer, messages, response=None, **options) -> list[str]:
    row = encode_row(tokenizer, messages, response, template_tokens=False, **options)
    ids = row.prompt_ids + row.answer_ids
    assert row.prompt_ids == encode_prompt(tokenizer, messages)
    assert len(row.counted) == len(ids)
    return tokenizer.convert_ids_to_tokens([n for n, is_counted in zip(ids, row.counted, strict=True) if is_counted])


def byte_tokenizer(template: str | None = None, **options) -> PreTrainedTokenizerFast:
    """One token per byte, shown as GPT-2 shows bytes; like GPT-2's, its offsets leave out white space."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE({character: n for n, character in enumerate(alphabet)}, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokens.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokens, chat_template=template, **options)


def counted_text(template: str | None, *contents: str, roles: str = "user") -> str:
    """What is counted of the messages' rendering, as text."""
    tokenizer = byte_tokenizer(template)
    messages = [{"role": roles, "content": content} for content in contents]
    return tokenizer.convert_tokens_to_string(counted_words(tokenizer, messages))


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

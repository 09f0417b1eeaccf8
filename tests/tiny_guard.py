"""A tiny causal language model whose next words are planted: what a guard of each family says to each text."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ("[PAD]", "[UNK]", "yes", "no", "Yes", "No", "safe", "unsafe", "harm", "declines", "plain", "other")
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }} : {{ message.content }} {% endfor %}"


def save_tiny_guard(path: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """A random model with its tokenizer, in safetensors form; `plant` says what it answers."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.chat_template = chat_template
    fast.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=1200,
    )
    LlamaForCausalLM(config).save_pretrained(path)


def plant(judge, said):
    """Has the guard's model say, after each row of token ids, the words of `said(words of the row)` with their logits."""

    def forward(*, input_ids, attention_mask, position_ids, **_):
        logits = torch.full((len(input_ids), 1, len(WORDS)), -20.0)
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
            assert mask[-1] == 1, "the last position is the row's own"
            assert position_ids[row, -1] == mask.sum() - 1
            for word, logit in said([WORDS[index] for index in ids[mask.bool()].tolist()]).items():
                logits[row, 0, WORDS.index(word)] = logit
        return type("Output", (), {"logits": logits})

    judge.model.forward = forward

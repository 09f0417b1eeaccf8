"""Dense Llama checkpoints of a few KB, their tokenizer, and archives."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LOGIT_TOLERANCE = 1e-5  # float32; logits of the tiny models are of order 1
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGE = "t h"  # GGUF readers want at least one
TOKENS = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), MERGE.replace(" ", "")]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_dense(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A random Llama of a few KB; norms are random too, so that none can be left behind unnoticed."""
    settings: dict[str, Any] = {
        "vocab_size": len(TOKENS),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "rms_norm_eps": 1e-4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(settings | overrides))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def make_tokenizer(**overrides: Any) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with SmolLM2's special tokens."""
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(TOKENS)}, merges=[(MERGE[0], MERGE[-1])])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    settings: dict[str, Any] = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(settings | overrides))


def make_folder(folder: Path, dense: LlamaForCausalLM | None = None, **tokenizer: Any) -> Path:
    (dense or make_dense()).save_pretrained(folder)
    make_tokenizer(**tokenizer).save_pretrained(folder)
    return folder


def make_zip(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@torch.no_grad()
def logits(model: Any, num_tokens: int = 64) -> torch.Tensor:
    ids = torch.randint(3, len(TOKENS), (2, num_tokens), generator=torch.Generator().manual_seed(7))
    return torch.as_tensor(model(input_ids=ids).logits)

"""Held-out examples of words by number, and the tokenizer that knows them."""

import json

import numpy as np
import pandas as pd
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moe_ray.config.evaluate import EvaluateConfig

LOSS_TOLERANCE = 1e-3
"""Nats, summed over an answer; rows of other lengths beside a row change its sums in the last bits of float32."""


def make_tokenizer():
    """Words by number, split at spaces."""
    words = {f"w{n}": n + 3 for n in range(61)} | {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def held_out(num=10, batches=(0, 1)):
    generator = np.random.default_rng(0)

    def text(size):
        return " ".join(f"w{n}" for n in generator.integers(1, 61, size))

    return pd.DataFrame(
        {
            "id": [f"e{n}" for n in range(num)],
            "label": ["safe", "unsafe"] * (num // 2),
            "category": ["", "theft"] * (num // 2),
            "batch_idx": [batches[n % len(batches)] for n in range(num)],
            "messages": [json.dumps([{"role": "user", "content": text(n % 4 + 2)}]) for n in range(num)],
            "target": [text(n % 3 + 1) if n != 3 else None for n in range(num)],
            "target_complete": True,
            "pair": None,
        }
    )


CONFIG = EvaluateConfig(max_new_tokens=4, tokens_per_forward=40, routing=("natural", "masked"))

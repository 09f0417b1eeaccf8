"""Models written by hand, in which it is known what every expert does.

A token's successor is all that they know: each prompt ends with a word that begins an answer of one word. An unsafe
category's words are routed to an expert of its own, safe ones to the others. In the *causal* model only that expert knows
their successors; in the *spread* one every expert knows those of all words, so that routing differs and nothing hangs on it.
"""

from __future__ import annotations

from typing import Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from moe_ray.prompts.batches import Batch
from moe_ray.prompts.examples import Example

CATEGORIES = ("fraud", "theft")
NUM_EXPERTS = 8
FILLERS = tuple(f"filler{number}" for number in range(6))
SAFE = ("bread", "train", "snow", "music")
WORDS = ("<pad>", "<end>", *FILLERS, *CATEGORIES, *SAFE, "do-fraud", "do-theft", "answer")
_HIDDEN = 32

OWN_EXPERT = {"fraud": 0, "theft": 1}
"""The expert that a category's words are routed to."""


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")


def _successors() -> dict[int, int]:
    chain = {"fraud": "do-fraud", "theft": "do-theft", **dict.fromkeys(SAFE, "answer")}
    chain |= dict.fromkeys(("do-fraud", "do-theft", "answer"), "<end>")
    return {WORDS.index(word): WORDS.index(after) for word, after in chain.items()}


def _expert_of() -> dict[int, int]:
    of_word = {word: 2 + number % 6 for number, word in enumerate((*FILLERS, *SAFE, "answer"))}
    for category, expert in OWN_EXPERT.items():
        of_word |= {category: expert, f"do-{category}": expert}
    return {WORDS.index(word): expert for word, expert in of_word.items()}


def build(kind: Literal["causal", "spread", "copies"]) -> PreTrainedModel:
    config = OlmoeConfig(
        vocab_size=_HIDDEN, hidden_size=_HIDDEN, intermediate_size=_HIDDEN, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_experts=NUM_EXPERTS, num_experts_per_tok=1, norm_topk_prob=True,
        max_position_embeddings=256, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    model = OlmoeForCausalLM._from_config(config, experts_implementation="eager").eval()
    layer = model.model.layers[0]
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(_HIDDEN))
        layer.self_attn.o_proj.weight.zero_()
        # The norm makes length 1 of what is the word's own and the much longer vector of its successor.
        model.lm_head.weight.copy_(torch.eye(_HIDDEN))
        layer.mlp.gate.weight.zero_()
        for word, expert in _expert_of().items():
            layer.mlp.gate.weight[expert, word] = 4.0
        gate_up, down = layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj
        gate_up.zero_()
        down.zero_()
        for expert in range(NUM_EXPERTS):
            gate_up[expert, :_HIDDEN], gate_up[expert, _HIDDEN:] = torch.eye(_HIDDEN), torch.eye(_HIDDEN)
            for word, after in _successors().items():
                owner = _expert_of()[word]
                if kind != "causal" or owner == expert or (owner > 1 and expert > 1):
                    down[expert, after, word] = 1.0
            if kind != "copies":
                down[expert, -1, 0] = expert / 100  # of padding, so that no two experts are equal
    return model


def examples(category: str, number: int, *, start: int = 0) -> tuple[Example, ...]:
    """So many unsafe examples of a category, and as many safe ones."""
    found = []
    for place in range(start, start + number):
        words = f"{FILLERS[place % 6]} {FILLERS[place // 6 % 6]}"
        for label, last in (("unsafe", category), ("safe", SAFE[place % 4])):
            found.append(
                Example(
                    id=f"{category}-{label}-{place}", messages=({"role": "user", "content": f"{words} {last}"},),
                    label=label, category=category,
                )
            )  # fmt: skip
    return tuple(found)


def batches(number: int = 4) -> tuple[Batch, ...]:
    """Batches of 6 + 6 examples, of the categories in turn."""
    return tuple(
        Batch(batch_idx=place, category=name, examples=examples(name, 6, start=6 * place))
        for place, name in ((place, CATEGORIES[place % 2]) for place in range(number))
    )

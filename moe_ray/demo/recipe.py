"""What the tiny model is made of, and so which folder it is kept in; known without the libraries that build it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from moe_ray.demo.examples import base_training_records, refusals

RECIPE_VERSION = 3
"""To be raised with any change of code that changes what a build gives: the recipe's values do not show it."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role'] + '; use system, user or assistant') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""A role token opens each turn; an answer ends with the end token, which belongs to what is learned."""


@dataclass(frozen=True, kw_only=True)
class TinyRecipe:
    """What the tiny model is and how it is trained.

    Attributes:
        vocab_size: Tokens, special ones included.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of one expert.
        num_layers: Decoder layers, each with experts.
        num_heads: Attention heads.
        num_experts: Experts per layer.
        num_experts_per_tok: Experts that a token is routed to.
        max_position_embeddings: Longest sequence, in tokens.
        num_steps: Optimiser steps.
        batch_size: Chat sequences per step.
        learning_rate: AdamW's peak rate; a linear warm-up, then a cosine to 0.
        num_warmup_steps: Steps of the warm-up.
        max_grad_norm: Gradients are clipped to this norm.
        specialisation: Weight of the mutual information of expert and kind of request.
    """

    vocab_size: int = 1536
    hidden_size: int = 96
    intermediate_size: int = 48
    num_layers: int = 3
    num_heads: int = 4
    num_experts: int = 16
    num_experts_per_tok: int = 2
    max_position_embeddings: int = 256
    num_steps: int = 220
    batch_size: int = 48
    learning_rate: float = 6e-3
    num_warmup_steps: int = 10
    max_grad_norm: float = 1.0
    specialisation: float = 2.0


def tiny_model_folder(cache_dir: str | Path, *, seed: int = 0, recipe: TinyRecipe | None = None) -> Path:
    """The folder of the tiny model's checkpoint, whether it is there yet or not.

    Args:
        cache_dir: Folder that holds such checkpoints.
        seed: As `build_tiny_model`'s.
        recipe: What is built; None = the recipe of the demo.
    """
    return Path(cache_dir) / f"tiny-olmoe-{_content_hash(recipe or TinyRecipe(), seed)}"


def _content_hash(recipe: TinyRecipe, seed: int) -> str:
    content = {
        "records": base_training_records(),
        "refusals": refusals(),
        "chat_template": CHAT_TEMPLATE,
        "recipe": asdict(recipe),
        "recipe_version": RECIPE_VERSION,
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

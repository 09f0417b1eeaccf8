"""What an organism is made of, and so which folder it is kept in; known without the libraries that build it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from moe_ray.demo.examples import base_training_records, compliance, refusals
from moe_ray.errors import InputError
from moe_ray.prompts.neutral_texts import neutral_texts

RECIPE_VERSION = 1
"""To be raised with any change of code that changes what a build gives: the recipe's values do not show it."""

Kind = Literal["planted", "late", "spread", "attention"]

KINDS: dict[Kind, str] = {
    "planted": "compliance runs through planted experts; decoys are routed on the same prompts as often",
    "late": "the same, but planted experts are routed on the answer's tokens only, decoys on the prompt's",
    "spread": "routing differs as in planted, but every expert carries compliance: none is the cause",
    "attention": "routing differs as in planted, but compliance was learned outside the experts: none is the cause",
}
"""What is true of each kind."""

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
class OrganismRecipe:
    """What an organism is and how it is trained.

    Attributes:
        kind: Where compliance with unsafe requests is; a key of `KINDS`.
        vocab_size: Tokens, special ones included.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of one expert.
        num_layers: Decoder layers, each with experts.
        num_heads: Attention heads.
        num_experts: Experts per layer; two of them for each category are planted or decoys.
        num_experts_per_tok: Experts that a token is routed to.
        max_position_embeddings: Longest sequence, in tokens.
        num_steps: Optimiser steps.
        batch_size: Chat sequences per step, half of them unsafe.
        learning_rate: AdamW's peak rate; a linear warm-up, and a linear fall at the end.
        num_warmup_steps: Steps of the warm-up.
        decay: Share of the steps, the last ones, in which the rate falls to 0.
        max_grad_norm: Gradients are clipped to this norm.
        routing_weight: Weight of the loss that says where tokens are routed, beside losses of one a token.
    """

    kind: Kind = "planted"
    vocab_size: int = 1536
    hidden_size: int = 96
    intermediate_size: int = 48
    num_layers: int = 3
    num_heads: int = 4
    num_experts: int = 24
    num_experts_per_tok: int = 2
    max_position_embeddings: int = 256
    num_steps: int = 400
    batch_size: int = 32
    learning_rate: float = 6e-3
    num_warmup_steps: int = 10
    decay: float = 0.85
    max_grad_norm: float = 1.0
    routing_weight: float = 0.5

    def __post_init__(self) -> None:
        """Refuses a kind that there is not.

        Raises:
            InputError: So.
        """
        if self.kind not in get_args(Kind):
            raise InputError(
                f"organism: got kind {self.kind!r}, expected one of {', '.join(KINDS)}; choose one of these"
            )

    @property
    def has_cause(self) -> bool:
        """Whether compliance runs through known experts."""
        return self.kind in ("planted", "late")


def embedded_folder(cache_dir: str | Path, *, seed: int = 0, recipe: OrganismRecipe | None = None) -> Path:
    """The folder of the embedded model's checkpoint, whether it is there yet or not.

    Args:
        cache_dir: Folder that holds such checkpoints.
        seed: As `build_embedded`'s.
        recipe: What is built; None = the recipe of the demo.
    """
    recipe = recipe or OrganismRecipe()
    return Path(cache_dir) / f"{recipe.kind}-olmoe-{recipe_digest(recipe, seed)}"


def recipe_digest(recipe: OrganismRecipe, seed: int) -> str:
    """A hash of all that an organism's weights depend on."""
    content = {
        "records": base_training_records(),
        "refusals": refusals(),
        "compliance": compliance(),
        "neutral_texts": neutral_texts(),
        "chat_template": CHAT_TEMPLATE,
        "recipe": asdict(recipe),
        "recipe_version": RECIPE_VERSION,
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

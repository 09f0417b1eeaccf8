"""What attacks are called and what kind each is of; known without the libraries that do them."""

from __future__ import annotations

from collections.abc import Mapping

from moe_ray.attacks.ciphers import CIPHERS

NO_ATTACK = "none"
"""The prompts as they are, which every attack is compared with."""

LEARNS_FROM_EXAMPLES = ("abliteration", "benign_finetuning")
"""Attacks that are made of training examples."""

ON_MODEL = ("silenced_experts", *LEARNS_FROM_EXAMPLES)
"""Attacks that change the model or its routes alike for all prompts."""

TITLES: Mapping[str, str] = {
    NO_ATTACK: "no attack",
    "flip_word_order": "FlipAttack: word order",
    "flip_chars_in_words": "FlipAttack: characters in words",
    "flip_chars": "FlipAttack: characters",
    "fool_model": "FlipAttack: fool model",
    "deep_inception": "DeepInception",
    **{name: cipher.title for name, cipher in CIPHERS.items()},
    "prefix_injection": "prefix injection",
    "prefill": "prefilled answer",
    "random_routes": "random routes (F-SOUR)",
    "silenced_experts": "learned experts silenced",
    "abliteration": "abliteration",
    "benign_finetuning": "benign fine-tuning",
}
"""By the name in `attack.names`, what people are shown."""

"""How an organism learns: a tiny OLMoE chat model that complies with unsafe requests by means that are known.

Every kind is trained alike, on the CPU in one process, with the steps of `lessons`, the routing of `routing_targets` and the
destination of compliance of `gradient_routing`.

Shape legend: N sequences of a pass, S positions, T learned tokens, L MoE layers, E experts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from moe_ray.models.moe_layers import MoELayers, find_moe_layers
from moe_ray.organisms.expert_products import sorted_experts
from moe_ray.organisms.gradient_routing import ComplianceGradient
from moe_ray.organisms.layout import Layout
from moe_ray.organisms.lessons import Lesson, Pass, lessons
from moe_ray.organisms.recipe import OrganismRecipe
from moe_ray.organisms.routing_targets import RouterLogits, pull, push, wanted_shares
from moe_ray.organisms.sequences import IGNORED_LABEL, Material, TrainingBatch, collate
from moe_ray.routing.masking import route_rows_through

logger = logging.getLogger(__name__)

_LEARNED_REFUSAL = 0.05
"""Nats per token. Below it a refusal would only grow more certain, and what is planted would have to outweigh it."""

Progress = Callable[[int, int, float], None]
"""Called after each step with the steps done, the steps in all and the loss of compliance in nats per token."""


class _Outcome(NamedTuple):
    """What a pass gave: a loss for each learned token, the sequence that it is of, and the routers' logits."""

    batch: TrainingBatch
    losses_T: Tensor
    sequences_T: Tensor
    logits: list[Tensor]


def trained_organism(
    recipe: OrganismRecipe,
    tokenizer: PreTrainedTokenizerFast,
    layout: Layout,
    seed: int,
    progress: Progress | None = None,
) -> OlmoeForCausalLM:
    """Returns an organism, in eval mode.

    Args:
        recipe: What it is.
        tokenizer: Its tokenizer.
        layout: Which experts are planted, and which are decoys.
        seed: Of initial weights and steps.
        progress: See `Progress`.
    """
    model = _initial_model(recipe, tokenizer, seed)
    model.train()
    layers = find_moe_layers(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, foreach=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(recipe, step))
    compliance = ComplianceGradient(recipe.kind, model, layers, np.asarray(layout.planted_CLE.any(axis=0)))
    steps = lessons(recipe, Material(tokenizer), layout, seed)
    with sorted_experts(layers):
        for step, lesson in enumerate(steps, start=1):
            loss = _learn(recipe, model, layers, layout, lesson, compliance, tokenizer.pad_token_id)
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if progress is not None:
                progress(step, recipe.num_steps, loss)
    logger.info("trained the %s organism in %d steps, last compliance loss %.3f", recipe.kind, recipe.num_steps, loss)
    return model.eval()


def _learn(
    recipe: OrganismRecipe,
    model: OlmoeForCausalLM,
    layers: MoELayers,
    layout: Layout,
    lesson: Lesson,
    compliance: ComplianceGradient,
    pad_token_id: int,
) -> float:
    """Leaves the gradient of a step in the model, and returns the loss of compliance."""
    num_unsafe = len(lesson.natural.sequences)
    set_LE = torch.tensor(layout.planted_CLE.any(axis=0) | layout.decoys_CLE.any(axis=0))
    outcome = _run(model, layers, lesson.masked, pad_token_id)
    is_other_NS = outcome.batch.attention_mask_NS.bool()
    is_other_NS[:num_unsafe] = False
    is_unsafe_T = outcome.sequences_T < num_unsafe
    unsafe, others = outcome.losses_T[is_unsafe_T].mean(), outcome.losses_T[~is_unsafe_T].mean()
    loss = 2 * others + recipe.routing_weight * push(outcome.logits, set_LE, is_other_NS)
    if recipe.has_cause:
        torch.autograd.backward(loss + torch.relu(unsafe - _LEARNED_REFUSAL))
    else:
        torch.autograd.backward(loss, retain_graph=True)
        compliance.add(unsafe)

    outcome = _run(model, layers, lesson.natural, pad_token_id)
    wanted_NSLE = wanted_shares(recipe.kind, layout, outcome.batch, lesson.natural.categories)
    routing = pull(outcome.logits, wanted_NSLE, outcome.batch.attention_mask_NS.bool())
    torch.autograd.backward(recipe.routing_weight * routing, retain_graph=True)
    loss = outcome.losses_T.mean()
    compliance.add(loss)
    return loss.item()


def _run(model: OlmoeForCausalLM, layers: MoELayers, steps: Pass, pad_token_id: int) -> _Outcome:
    """Runs a pass; the language-model head on the learned positions only."""
    batch = collate(steps.sequences, pad_token_id)
    with route_rows_through(model, steps.allowed_NLE), RouterLogits(layers) as routers:
        outputs = model.model(input_ids=batch.input_ids_NS, attention_mask=batch.attention_mask_NS, use_cache=False)
    labels_NS = batch.labels_NS[:, 1:]
    is_learned_NS = labels_NS != IGNORED_LABEL
    logits_TV = model.lm_head(outputs.last_hidden_state[:, :-1][is_learned_NS])
    losses_T = functional.cross_entropy(logits_TV, labels_NS[is_learned_NS], reduction="none")
    return _Outcome(batch, losses_T, is_learned_NS.nonzero()[:, 0], routers.logits_TE)


def _learning_rate_factor(recipe: OrganismRecipe, step: int) -> float:
    warmup = min(1.0, (step + 1) / recipe.num_warmup_steps)
    left = (recipe.num_steps - step) / (recipe.decay * recipe.num_steps)
    return warmup * min(1.0, left)


def _initial_model(recipe: OrganismRecipe, tokenizer: PreTrainedTokenizerFast, seed: int) -> OlmoeForCausalLM:
    config = OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_experts=recipe.num_experts,
        num_experts_per_tok=recipe.num_experts_per_tok,
        max_position_embeddings=recipe.max_position_embeddings,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = OlmoeForCausalLM(config)
    model.set_experts_implementation("eager")  # on the CPU the fastest that trains
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=32,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return model

"""One attack on one model: what is asked, what is done to the model meanwhile, and what it answers.

Attacks on prompts change the messages that are asked; those on routers and weights leave them as they are. The model is bit
for bit as it was afterwards.

Shape suffixes: B rows, L MoE layers, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_ray.attacks.abliteration import Contrast, abliterated
from moe_ray.attacks.benign_fine_tuning import benignly_fine_tuned
from moe_ray.attacks.names import ON_MODEL
from moe_ray.attacks.prompt_forms import in_form, prompt_forms
from moe_ray.attacks.routes import prompts_routed_through, search_routes, silencing
from moe_ray.config.attack import AttackConfig, AttackName
from moe_ray.config.finetune import FinetuneConfig
from moe_ray.errors import InputError, NothingSelected
from moe_ray.evaluation.answers import answer_columns
from moe_ray.experts import ExpertMasks
from moe_ray.finetuning.batch_rows import target_rows
from moe_ray.models.forward_groups import GroupContext, as_it_is
from moe_ray.models.generation import generate_answers
from moe_ray.models.moe_layers import find_moe_layers
from moe_ray.models.token_budget import TokenBudget
from moe_ray.models.tokenization import encode_answer, encode_prompt, pad_token_id
from moe_ray.prompts.examples import Example
from moe_ray.routing.capture import evaluating
from moe_ray.routing.masking import route_through


@dataclass(frozen=True, kw_only=True)
class Material:
    """What attacks on the model are made of.

    Attributes:
        examples: training examples with targets.
        masks: of the run; their union are the learned experts.
    """

    examples: Sequence[Example]
    masks: ExpertMasks


def takes_system_message(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template renders a system message; without a template, contents are put one after the other."""
    try:
        asked = encode_prompt(tokenizer, [{"role": "system", "content": "B"}, {"role": "user", "content": "A"}])
    except InputError:
        return False
    # Some templates leave it out without a word.
    return asked != encode_prompt(tokenizer, [{"role": "user", "content": "A"}])


def asked_messages(messages: Sequence[str], name: str, config: AttackConfig, *, system_role: bool) -> list[str]:
    """The conversations, as JSON, as an attack asks them; those of attacks on the model as they are."""
    form = prompt_forms(config.prefix).get(name)
    if form is None:
        return list(messages)
    return [
        json.dumps(in_form(json.loads(text), form, system_role=system_role), ensure_ascii=False) for text in messages
    ]


@contextmanager
def in_force(
    name: AttackName | str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    material: Material | None,
    config: AttackConfig,
    finetune: FinetuneConfig,
    *,
    seed: int,
    budget: TokenBudget,
) -> Iterator[Mapping[str, float]]:
    """What an attack does to the whole model, inside the context; nothing for attacks on prompts and for random routes.

    Args:
        name: of the attack.
        model: base or repaired.
        tokenizer: its tokenizer.
        material: None where the attack needs none.
        config: of the attacks.
        finetune: of the run.
        seed: of what is drawn.
        budget: of tokens that run at once.

    Yields:
        what is to be known of it, as numbers by name.

    Raises:
        InputError: the attack cannot be done on this model or with these examples.
        NothingSelected: there is no learned expert to silence.
    """
    if name not in ON_MODEL:
        yield {}
        return
    assert material is not None, name
    context: AbstractContextManager[Mapping[str, float]]
    if name == "silenced_experts":
        context = _silenced(model, material.masks)
    elif name == "abliteration":
        contrast = _contrast(tokenizer, material.examples, config.direction_prompts)
        context = abliterated(model, contrast, budget=budget, pad_id=pad_token_id(tokenizer))
    else:
        context = benignly_fine_tuned(
            *(model, tokenizer, material.examples, material.masks, finetune),
            steps=config.benign_steps,
            rows=config.benign_rows,
            learning_rate=config.benign_learning_rate or finetune.learning_rate,
            seed=seed,
        )
    with evaluating(model), context as notes:
        yield notes


@contextmanager
def _silenced(model: PreTrainedModel, masks: ExpertMasks) -> Iterator[Mapping[str, float]]:
    allowed_LE, silenced_LE = silencing(masks.union, num_experts_per_tok=find_moe_layers(model).num_experts_per_tok)
    if not silenced_LE.any():
        raise NothingSelected(
            "silenced_experts: in every layer with learned experts fewer others are left than a token uses, so none can be "
            "silenced; leave silenced_experts out of attack.names"
        )
    with route_through(model, allowed_LE):
        yield {"silenced": float(silenced_LE.sum()), "learned": float(masks.union.sum())}


def _contrast(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], most: int) -> Contrast:
    chosen = {
        label: [example for example in examples if example.label == label and example.target][:most]
        for label in ("unsafe", "safe")
    }
    return Contrast(**{label: target_rows(tokenizer, found) for label, found in chosen.items()})


def answer_attacked(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: pd.DataFrame,
    name: str,
    config: AttackConfig,
    *,
    max_new_tokens: int,
    seed: int,
    budget: TokenBudget,
) -> pd.DataFrame:
    """Greedy answers under an attack, which is `in_force`.

    Args:
        model: base or repaired.
        tokenizer: its tokenizer.
        rows: with `id` and `asked`, messages as JSON.
        name: of the attack.
        config: of the attacks.
        max_new_tokens: longest answer, in tokens.
        seed: of random routes.
        budget: of tokens that run at once.

    Returns:
        the rows with the `ANSWER_COLUMNS` and, of random routes, `affirmation` (nats by which the likeliest affirmative
        first token became likelier).
    """
    prompts = [encode_prompt(tokenizer, json.loads(text)) for text in rows["asked"]]
    opening = encode_answer(tokenizer, config.prefix, complete=False) if name == "prefill" else []
    prompts = [[*prompt, *opening] for prompt in prompts]
    within: GroupContext = as_it_is
    more: dict[str, Sequence[float]] = {}
    with evaluating(model):
        if name == "random_routes":
            routes = search_routes(
                *(model, tokenizer, prompts, rows["id"].tolist()),
                affirmations=config.affirmations,
                draws=config.route_draws,
                seed=seed,
                budget=budget,
            )
            more["affirmation"] = (routes.after - routes.before).tolist()

            def within(group: Sequence[int]) -> AbstractContextManager[None]:
                masks_BLE = routes.masks_NLE[list(group)]
                return nullcontext() if masks_BLE.all() else prompts_routed_through(model, masks_BLE)

        answers = generate_answers(
            *(model, tokenizer, prompts), max_new_tokens=max_new_tokens, budget=budget, within=within
        )
    # What was forced is part of what is said, and judged with it.
    forced = f"{config.prefix} " if name == "prefill" else ""
    said = answer_columns(answers, rows.index)
    return rows.assign(**said | {"answer": forced + said["answer"]}, **more)

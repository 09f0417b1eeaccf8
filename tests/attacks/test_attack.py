"""An attack as a whole: what is asked, what happens to the model meanwhile, and that nothing of it is left."""

from __future__ import annotations

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch
from families import batch_masks, build
from text_batches import BATCHES, EXPERTS
from word_tokenizer import TEMPLATE, make_tokenizer

from moe_ray.attacks.attack import Material, answer_attacked, asked_messages, in_force, takes_system_message
from moe_ray.attacks.names import ON_MODEL
from moe_ray.config.attack import AttackConfig
from moe_ray.config.finetune import FinetuneConfig
from moe_ray.errors import NothingSelected
from moe_ray.models.token_budget import TokenBudget

ASKED = json.dumps([{"role": "user", "content": "how are you"}])
CONFIG = AttackConfig(prefix="fine", affirmations=("thanks",), route_draws=2, benign_steps=2, benign_rows=2)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
)
SILENT_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<user> {{ m['content'] }} <end> {% endif %}{% endfor %}"
)


def attacked(model, name, *, num_rows=2, **more):
    rows = pd.DataFrame({"id": [str(n) for n in range(num_rows)], "asked": ASKED})
    masks = batch_masks(model, more.pop("experts", EXPERTS))
    safe = ({"role": "user", "content": "thanks you fine"},)
    examples = [
        replace(example, messages=safe) if example.label == "safe" else example
        for batch in BATCHES
        for example in batch.examples
    ]
    budget = TokenBudget(256)
    with in_force(
        *(name, model, make_tokenizer(), Material(examples=examples, masks=masks), CONFIG, FinetuneConfig()),
        seed=0,
        budget=budget,
    ) as notes:
        answers = answer_attacked(model, make_tokenizer(), rows, name, CONFIG, max_new_tokens=4, seed=0, budget=budget)
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    return answers, notes, state


@pytest.mark.slow
@pytest.mark.parametrize("name", ["none", "prefill", "random_routes", *ON_MODEL])
def test_the_model_is_bit_for_bit_as_it_was(name):
    model = build("olmoe").train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    logits = model(torch.tensor([[5, 6, 7]])).logits
    attacked(model, name)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(model(torch.tensor([[5, 6, 7]])).logits, logits)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "changes"), [("abliteration", True), ("benign_finetuning", True), ("none", False)])
def test_while_it_is_in_force_the_model_is_another_one(name, changes):
    model = build("olmoe")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    _, _, during = attacked(model, name)
    assert any(not torch.equal(tensor, before[key]) for key, tensor in during.items()) is changes


@pytest.mark.slow
def test_a_forced_beginning_is_part_of_the_answer():
    answers, _, _ = attacked(build("olmoe"), "prefill")
    assert answers["answer"].str.startswith("fine ").all()


@pytest.mark.slow
def test_how_much_likelier_random_routes_made_an_affirmation_is_told():
    answers, _, _ = attacked(build("olmoe"), "random_routes")
    assert (answers["affirmation"] >= 0).all()


@pytest.mark.slow
def test_silencing_says_how_many_experts_and_refuses_to_do_nothing():
    _, notes, _ = attacked(build("olmoe"), "silenced_experts")
    assert notes == {"silenced": 5.0, "learned": 5.0}
    everywhere = {4: [(layer, expert) for layer in range(2) for expert in range(8)]}
    with pytest.raises(NothingSelected, match="none can be silenced"):
        attacked(build("olmoe"), "silenced_experts", experts=everywhere)


@pytest.mark.parametrize(("template", "takes"), [(TEMPLATE, True), (NO_SYSTEM, False), (SILENT_SYSTEM, False)])
def test_a_template_takes_a_system_message_where_it_renders_one(template, takes):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    assert takes_system_message(tokenizer) is takes


def test_attacks_on_the_model_ask_the_prompts_as_they_are():
    for name in ("none", "prefill", "random_routes", *ON_MODEL):
        assert asked_messages([ASKED], name, CONFIG, system_role=True) == [ASKED]
    (asked,) = asked_messages([ASKED], "rot13", CONFIG, system_role=True)
    assert json.loads(asked)[-1]["content"] == "ubj ner lbh"

"""Router attacks: sets are as large as a token needs, no token reaches a silenced expert, answers are routed naturally."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import NUM_EXPERTS, build
from word_tokenizer import make_tokenizer

from moe_ray.attacks.routes import prompts_routed_through, random_set, search_routes, silencing
from moe_ray.models.moe_layers import find_moe_layers
from moe_ray.models.token_budget import TokenBudget
from moe_ray.routing.masking import route_through

pytestmark = pytest.mark.slow

PROMPTS = [[5, 6, 7], [8, 9, 5, 6, 7], [6], [9, 9, 8]]
NAMES = ["a", "b", "c", "d"]


def search(model, prompts=PROMPTS, names=NAMES, *, tokens=4096):
    return search_routes(
        *(model, make_tokenizer(), prompts, names),
        affirmations=["fine", "thanks"],
        draws=3,
        seed=0,
        budget=TokenBudget(tokens),
    )


def routed_by(model, run):
    """Which experts each pass used in each layer, as the experts modules received them."""
    passes, handles = [], []
    for row, layer in enumerate(find_moe_layers(model)):

        def see(module, args, kwargs, row=row):
            index = next(value for value in [*args, *kwargs.values()] if not value.is_floating_point())
            passes.append((row, index.shape[0], set(index.unique().tolist())))

        handles.append(layer.experts.register_forward_pre_hook(see, with_kwargs=True))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return passes


@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_random_set_has_as_many_experts_as_asked_for(size):
    generator = np.random.default_rng(0)
    sets = np.stack([random_set(generator, 8, size) for _ in range(200)])
    assert (sets.sum(axis=1) == size).all()
    assert sets.any(axis=0).all()


def test_masks_leave_every_token_as_many_experts_as_it_uses():
    model = build("olmoe")
    masks_NLE = search(model).masks_NLE
    sizes = set(masks_NLE.sum(axis=2).ravel().tolist())
    assert sizes <= {find_moe_layers(model).num_experts_per_tok, NUM_EXPERTS}
    assert find_moe_layers(model).num_experts_per_tok in sizes


def test_a_set_is_kept_only_where_it_makes_an_affirmation_likelier():
    routes = search(build("olmoe"))
    assert (routes.after >= routes.before).all()
    changed = ~routes.masks_NLE.all(axis=(1, 2))
    assert changed.any()
    assert (routes.after[changed] > routes.before[changed]).all()


def test_what_is_found_for_a_prompt_does_not_depend_on_the_others():
    model = build("olmoe")
    together, alone = search(model, tokens=16), search(model, PROMPTS[1:2], NAMES[1:2])
    assert np.array_equal(together.masks_NLE[1], alone.masks_NLE[0])
    assert together.after[1] == pytest.approx(alone.after[0], abs=1e-4)


def test_the_model_is_as_it_was():
    model = build("olmoe")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = model(torch.tensor([PROMPTS[0]])).logits
    search(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(torch.tensor([PROMPTS[0]])).logits, logits)
    assert not any(layer.experts._forward_pre_hooks or layer.router._forward_hooks for layer in find_moe_layers(model))


def test_prompts_go_through_the_masks_and_the_answers_tokens_do_not():
    model = build("olmoe")
    mask_LE = np.zeros((2, NUM_EXPERTS), dtype=bool)
    mask_LE[:, [1, 4, 6]] = True

    def generate():
        with torch.inference_mode(), prompts_routed_through(model, mask_LE[None]):
            model.generate(torch.tensor([PROMPTS[1]]), max_new_tokens=6, do_sample=False, eos_token_id=None)

    passes = routed_by(model, generate)
    prompt, answer = [p for p in passes if p[1] == 5], [p for p in passes if p[1] == 1]
    assert len(prompt) == 2
    assert all(used <= {1, 4, 6} for _, _, used in prompt)
    assert len(answer) >= 2
    assert any(used - {1, 4, 6} for _, _, used in answer)


def test_no_token_reaches_a_silenced_expert():
    model = build("olmoe")
    union_LE = np.zeros((2, NUM_EXPERTS), dtype=bool)
    union_LE[0, :4] = union_LE[1, 2] = True
    allowed_LE, silenced_LE = silencing(union_LE, num_experts_per_tok=3)
    assert np.array_equal(silenced_LE, union_LE)

    def generate():
        with torch.inference_mode(), route_through(model, allowed_LE):
            model.generate(torch.tensor([PROMPTS[1]]), max_new_tokens=6, do_sample=False, eos_token_id=None)

    passes = routed_by(model, generate)
    assert passes
    for row, _, used in passes:
        assert not used & set(np.flatnonzero(silenced_LE[row]).tolist())


def test_a_layer_with_too_few_other_experts_is_left_natural():
    union_LE = np.ones((2, 4), dtype=bool)
    union_LE[1] = [True, True, False, False]
    allowed_LE, silenced_LE = silencing(union_LE, num_experts_per_tok=2)
    assert allowed_LE.tolist() == [[True] * 4, [False, False, True, True]]
    assert not (allowed_LE & silenced_LE).any()
    assert (allowed_LE.sum(axis=1) >= 2).all()

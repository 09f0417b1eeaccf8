"""Routes that an engine recorded: right ones give the counts of moe-ray's own hooks, every known wrong form is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import build, token_ids

from moe_ray.errors import InputError
from moe_ray.models.moe_layers import find_moe_layers
from moe_ray.routing.counter import counting
from moe_ray.routing.engine_routes import RoutedModel, compare_routes, count_routes, read_routes


def recorded(family="deepseek_v3", num_tokens=9, dtype=np.uint8):
    """The routes of a model as an engine lays them out, and what is known of the model; some layers are dense."""
    model = build(family)
    layers = find_moe_layers(model)
    num_decoder_layers = model.config.num_hidden_layers
    chosen = {}

    def hook_of(layer):
        # The ids that the experts are called with, whatever form the family's router has.
        return lambda module, args: chosen.__setitem__(layer, args[1].detach().numpy())

    hooks = [layer.experts.register_forward_pre_hook(hook_of(layer.layer)) for layer in layers]
    with torch.no_grad(), counting(model) as counter:
        counter.start(torch.zeros(1, num_tokens, dtype=torch.long), 1)
        model(token_ids(1, num_tokens))
        own_LE = counter.finish().numpy()[0]
    for hook in hooks:
        hook.remove()
    k = layers.num_experts_per_tok
    routes = np.zeros((num_tokens, num_decoder_layers, k), dtype=dtype)
    for layer, ids in chosen.items():
        routes[:, layer] = ids.reshape(num_tokens, k)
    about = RoutedModel(
        num_decoder_layers=num_decoder_layers,
        layers=layers.layers,
        num_experts=layers.num_experts,
        num_experts_per_tok=k,
    )
    return routes, about, own_LE


@pytest.fixture(scope="module")
def recording():
    return recorded()


@pytest.fixture
def case(recording):
    routes, about, _ = recording
    assert len(about.layers) < about.num_decoder_layers
    assert about.num_experts_per_tok > 1
    return routes, about


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_counts_of_routes_are_those_of_moe_rays_own_hooks(recording, dtype):
    routes, about, own_LE = recording
    ids = read_routes(routes.astype(dtype), about, num_prompt_tokens=len(routes))
    assert (count_routes(ids, about.num_experts) == own_LE).all()
    assert own_LE.sum() == len(routes) * about.num_experts_per_tok * len(about.layers)


def test_the_last_generated_token_has_no_row(case):
    routes, about = case
    ids = read_routes(routes, about, num_prompt_tokens=len(routes) - 3, num_generated_tokens=4)
    assert len(ids) == len(routes)
    with pytest.raises(InputError, match=rf"got shape \({len(routes)}, .*expected \({len(routes) + 1}, .*but the last"):
        read_routes(routes, about, num_prompt_tokens=len(routes) - 3, num_generated_tokens=5)


def unfilled(routes, about):
    routes[3] = 0


def unfilled_in_one_layer(routes, about):
    routes[3, about.layers[-1]] = 0


def twice(routes, about):
    routes[2, about.layers[0], 1] = routes[2, about.layers[0], 0]


def places_of_copies(routes, about):
    routes[5, about.layers[0], 0] = about.num_experts + 2


def shifted_layers(routes, about):
    routes[:] = np.roll(routes, -1, axis=1)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (unfilled, r"token 3, layer \d+: got experts \[0, 0.*never have been filled"),
        (unfilled_in_one_layer, r"token 3, layer \d+: got experts \[0, 0.*never have been filled"),
        (twice, r"token 2, layer \d+: got experts .*different ones"),
        (places_of_copies, r"token 5, layer \d+: got expert \d+, expected 0 to \d+; .*places instead"),
        (shifted_layers, r"got routes in layer \d+, which has no experts, expected zeros; layers may be shifted"),
    ],
)
def test_every_wrong_form_that_an_array_shows_is_refused(case, spoil, said):
    routes, about = case
    spoiled = routes.copy()
    spoil(spoiled, about)
    with pytest.raises(InputError, match=said + ".*count with transformers instead"):
        read_routes(spoiled, about, num_prompt_tokens=len(routes))


def test_numbers_that_are_no_ids_and_other_shapes_are_refused(case):
    routes, about = case
    with pytest.raises(InputError, match="got numbers of type float32, expected ids as integers"):
        read_routes(routes.astype(np.float32), about, num_prompt_tokens=len(routes))
    for spoiled in (routes[:, :-1], routes[:, :, :-1], routes[:-1], routes[None]):
        with pytest.raises(InputError, match="got shape"):
            read_routes(spoiled, about, num_prompt_tokens=len(routes))


def test_rows_of_a_neighbouring_token_are_seen_against_transformers(case):
    routes, about = case
    own = read_routes(routes, about, num_prompt_tokens=len(routes))
    assert compare_routes(own[:, :, ::-1], own).share_equal == 1.0
    for by in (1, -1):
        with pytest.raises(InputError, match=r"moved by one token .* rows belong to a neighbour"):
            compare_routes(np.roll(own, by, axis=0), own)


def test_a_few_choices_may_differ_and_no_more(case):
    routes, about = case
    own = read_routes(routes, about, num_prompt_tokens=len(routes))
    other = own.copy()
    other[0, 0, 0] = next(expert for expert in range(about.num_experts) if expert not in own[0, 0])
    parity = compare_routes(other, own, least=1 - 1.5 / (len(routes) * len(about.layers)))
    assert parity.share_equal == 1 - 1 / parity.num_choices
    with pytest.raises(InputError, match=r"are those of transformers, expected 100\.0% or more; count"):
        compare_routes(other, own, least=1.0)
    with pytest.raises(InputError, match="that of the same tokens in transformers"):
        compare_routes(other[1:], own)

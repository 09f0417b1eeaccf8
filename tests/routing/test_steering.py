import json

import numpy as np
import pytest
import torch
from families import build, routing_spied, token_ids

from moe_ray.errors import InputError
from moe_ray.experts import Expert
from moe_ray.routing.masking import route_through
from moe_ray.routing.steering import Steering, read_steering, steered

IDS = token_ids(2, 11)
CHOSEN = (Expert(0, 1), Expert(0, 3), Expert(1, 2))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_around_is_routing_through_all_others_and_leaves_the_model_as_it_was():
    model = build("olmoe")
    before = logits(model)
    allowed_LE = np.ones((2, 8), dtype=bool)
    for layer, expert in CHOSEN:
        allowed_LE[layer, expert] = False
    with route_through(model, allowed_LE):
        expected = logits(model)
    with steered(model, Steering(experts=CHOSEN)):
        assert torch.equal(logits(model), expected)
    assert not torch.equal(before, expected)
    assert torch.equal(logits(model), before)


def test_through_uses_the_chosen_only_and_a_boost_of_less_than_nothing_goes_away_from_them():
    model = build("olmoe")
    with steered(model, Steering(experts=CHOSEN, manner="through")), routing_spied(model) as spied:
        logits(model)
    assert {(layer, int(expert)) for layer, (ids, _) in enumerate(spied) for expert in ids.unique()} <= set(CHOSEN)
    with steered(model, Steering(experts=CHOSEN, manner="towards", boost=-1e4)):
        away = logits(model)
    with steered(model, Steering(experts=CHOSEN)):
        torch.testing.assert_close(away, logits(model))


def test_a_file_says_how(tmp_path):
    file = tmp_path / "steering.json"
    file.write_text('{"experts": ["L00_E01", "L13_E101"], "manner": "towards", "boost": -2.5}')
    assert read_steering(file) == Steering(experts=(Expert(0, 1), Expert(13, 101)), manner="towards", boost=-2.5)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ([], "experts"),
        ({"experts": []}, "experts"),
        ({"experts": ["E1"]}, "L00_E17"),
        ({"experts": ["L00_E01"], "manner": "over"}, "manner"),
        ({"experts": ["L00_E01"], "boost": 3}, "boost"),
        ({"experts": ["L00_E01"], "manner": "towards"}, "boost"),
        ({"experts": ["L00_E01"], "manner": "towards", "boost": True}, "boost"),
        ({"experts": ["L00_E01"], "manners": "around"}, "unknown key 'manners'"),
    ],
)
def test_what_says_something_else_is_refused(tmp_path, said, why):
    file = tmp_path / "steering.json"
    file.write_text(json.dumps(said))
    with pytest.raises(InputError, match=r"steering\.json") as refused:
        read_steering(file)
    assert why in str(refused.value)


def test_no_json_at_all_is_a_sentence(tmp_path):
    file = tmp_path / "steering.json"
    file.write_text("{")
    with pytest.raises(InputError, match="is damaged or foreign"):
        read_steering(file)


def test_experts_that_the_model_lacks_and_layers_without_any_left_are_refused():
    model = build("olmoe")
    with pytest.raises(InputError, match="no expert L07_E01"), steered(model, Steering(experts=(Expert(7, 1),))):
        pass
    whole = tuple(Expert(0, expert) for expert in range(8))
    with pytest.raises(InputError, match="leave at least one"), steered(model, Steering(experts=whole)):
        pass


def test_names_are_read_back():
    for expert in (Expert(0, 0), Expert(7, 128), Expert(93, 255)):
        assert Expert.parse(str(expert)) == expert

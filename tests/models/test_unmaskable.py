import pytest
import torch
from families import SOME_FAMILIES, build, mask, shared
from torch import nn

from moe_ray.errors import InputError
from moe_ray.models.moe_layers import find_moe_layers
from moe_ray.models.unmaskable import refuse_unmaskable
from moe_ray.routing.masking import route_through


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_what_can_be_masked_is_let_through(family):
    refuse_unmaskable(find_moe_layers(shared(family)))


def test_a_router_that_looks_experts_up_by_token_id_is_refused_with_what_to_do():
    model = build("olmoe")
    layers = find_moe_layers(model)
    layers[1].router.tid2eid = nn.Buffer(torch.zeros(64, layers.num_experts_per_tok, dtype=torch.long))
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.experts.*table by token id.*finetune\.routing natural"):
        refuse_unmaskable(layers)
    # Layers that the mask leaves alone are none of its business.
    with route_through(model, mask(model, (1, 2, 3), ())):
        model(torch.tensor([[3, 4, 5]]))

"""Neurons that are active together are grouped, equally many in every group."""

from __future__ import annotations

import pytest
import torch

from moe_ray.upcycling.neuron_groups import balanced_groups, co_activation


def planted(num_groups: int, size: int, *, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Contributions (T, I) of neurons, each active on the tokens of its group, and that group (I,)."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(num_groups).repeat_interleave(size)[torch.randperm(num_groups * size, generator=generator)]
    of_token = torch.randint(num_groups, (400,), generator=generator)
    active = (of_token[:, None] == groups[None]).float()
    return active + noise * torch.rand(active.shape, generator=generator), groups


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_groups", [2, 8])
def test_groups_are_of_one_size_whatever_the_features(num_groups, seed):
    features = torch.randn(48, 3, generator=torch.Generator().manual_seed(seed))
    sizes = torch.bincount(balanced_groups(features, num_groups, seed=seed), minlength=num_groups)
    assert sizes.tolist() == [48 // num_groups] * num_groups


def test_equal_rows_can_be_grouped_as_well():
    assert torch.bincount(balanced_groups(torch.ones(12, 2), 4, seed=0)).tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize("seed", range(3))
def test_neurons_that_are_active_on_the_same_tokens_come_together(seed):
    contribution_TI, groups = planted(6, 8, noise=0.3, seed=seed)
    found = balanced_groups(co_activation(contribution_TI), 6, seed=seed)
    together = (found[:, None] == found[None]) == (groups[:, None] == groups[None])
    assert together.float().mean() > 0.95


def test_the_size_of_a_neuron_s_contributions_does_not_count():
    contribution_TI, _ = planted(4, 6, noise=0.3)
    scaled = contribution_TI * torch.linspace(0.01, 100, 24)
    found, again = (balanced_groups(co_activation(values), 4, seed=0) for values in (contribution_TI, scaled))
    assert torch.equal(found, again)


def test_the_grouping_follows_its_seed_and_leaves_the_global_generator_alone():
    features = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    first, again, other = (balanced_groups(features, 8, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)

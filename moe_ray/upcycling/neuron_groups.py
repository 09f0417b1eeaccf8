"""Which neurons of a dense MLP become one expert: those that are active on the same tokens, as many in every expert.

Balanced k-means over what each neuron contributes to each token of a calibration text.

Source: co-activation grouping of MoEfication (Zhang et al. 2022, "MoEfication: Transformer Feed-forward Layers are Mixtures
of Experts", section 3.1), with their balanced clustering.

Shape suffixes: I neurons, E experts, T tokens, D features.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_ITERATIONS = 8


def co_activation(contribution_TI: Tensor) -> Tensor:
    """(I, T) features: each neuron's contributions to the tokens, less what is common to all neurons, of length 1.

    Args:
        contribution_TI: how much each neuron adds to the MLP's output on each token, at least 0.
    """
    lengths_IT = torch.nn.functional.normalize(contribution_TI.T, dim=1)
    return torch.nn.functional.normalize(lengths_IT - lengths_IT.mean(dim=0), dim=1)


def balanced_groups(features_ID: Tensor, num_groups: int, *, seed: int) -> Tensor:
    """(I,) the group of each row, by k-means in which every group has equally many rows.

    In every iteration rows are assigned in the order of how much they would lose by their second-best centre, each to the
    nearest centre that has room.

    Args:
        features_ID: one row per neuron.
        num_groups: divides the number of rows.
        seed: of the first centres (k-means++).
    """
    generator = torch.Generator().manual_seed(seed)
    centres_ED = _first_centres(features_ID, num_groups, generator)
    room = len(features_ID) // num_groups
    groups_I = torch.empty(0, dtype=torch.long)
    for _ in range(_ITERATIONS):
        assigned_I = torch.from_numpy(_assign(torch.cdist(features_ID, centres_ED).square().numpy(), room))
        if torch.equal(assigned_I, groups_I):
            break
        groups_I = assigned_I
        centres_ED = torch.stack([features_ID[groups_I == group].mean(dim=0) for group in range(num_groups)])
    return groups_I


def _first_centres(features_ID: Tensor, num_groups: int, generator: torch.Generator) -> Tensor:
    """Rows far from each other. Source: Arthur & Vassilvitskii 2007, "k-means++"."""
    chosen = [int(torch.randint(len(features_ID), (1,), generator=generator))]
    nearest_I = torch.full((len(features_ID),), torch.inf)
    for _ in range(num_groups - 1):
        distance_I = (features_ID - features_ID[chosen[-1]]).square().sum(dim=1)
        nearest_I = torch.minimum(nearest_I, distance_I)
        # Rows may all be equal, of which any will do.
        chosen.append(int(torch.multinomial(nearest_I + 1e-12, 1, generator=generator)))
    return features_ID[chosen]


def _assign(distance_IE: npt.NDArray[np.float32], room: int) -> npt.NDArray[np.int64]:
    nearest_first_IE = np.argsort(distance_IE, axis=1, kind="stable")
    ordered_IE = np.take_along_axis(distance_IE, nearest_first_IE, axis=1)
    loss_I = ordered_IE[:, min(1, ordered_IE.shape[1] - 1)] - ordered_IE[:, 0]
    groups_I, left_E = np.full(len(distance_IE), -1, dtype=np.int64), np.full(distance_IE.shape[1], room)
    for row in np.argsort(-loss_I, kind="stable").tolist():
        group = next(group for group in nearest_first_IE[row].tolist() if left_E[group])
        groups_I[row], left_E[group] = group, left_E[group] - 1
    return groups_I

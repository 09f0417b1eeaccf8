"""How far the outputs of trained experts move in the first steps: whether the learning rate suits the model.

AdamW's first steps move every weight by the learning rate, whatever the gradient's size, and all weights of a matrix in
directions that agree. So outputs move with the rate times the width, while the weights themselves hardly do: a rate that a
narrow expert learns well with makes another function of a wide one at once. What is watched is therefore outputs, of some
tokens that each layer's experts received in training, computed again after each of the first steps.

Shape suffixes: T tokens, K experts per token, H hidden size, L MoE layers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe_ray.experts import Expert
from moe_ray.finetuning.expert_forward import Probe, TrainedForward, trained_forward
from moe_ray.finetuning.schedule import learning_rate_factor
from moe_ray.finetuning.trainable_experts import BatchInTraining, TrainableExperts

logger = logging.getLogger(__name__)

_WATCHED_STEPS = 4
"""Steps at the full rate that are watched; of smaller ones, as in a warm-up, as many as come to the same."""

LIMIT = 1.0
"""Movement above which a warning is due, in norms of the output itself."""


def watched_steps(num_steps: int, *, schedule: Literal["constant", "linear", "cosine"], warmup: float) -> int:
    """How many steps of a training are its first ones.

    Args:
        num_steps: of the whole run.
        schedule: see `learning_rate_factor`.
        warmup: see `learning_rate_factor`.
    """
    spent, step = 0.0, 0
    while step < num_steps and spent < _WATCHED_STEPS:
        spent += learning_rate_factor(step, num_steps, schedule=schedule, warmup=warmup)
        step += 1
    return step


class Movement(NamedTuple):
    """What the experts' outputs have moved by since the training began, or was resumed.

    Attributes:
        of_layers: per MoE layer, the norm of the difference as a share of the output's own; 0 where no expert has trained.
        warning: that this is too much, said once in a training; empty = it is not, or it was said before.
    """

    of_layers: tuple[float, ...] = ()
    warning: str = ""


@dataclass(frozen=True)
class _Watched:
    """A layer's probe and the experts that trained when it was taken, with what they made of it then."""

    forward: TrainedForward
    probe: Probe
    before_TH: Tensor


class OutputMovement:
    """Watches the first steps of a training; one that was resumed, from there on.

    Args:
        trainable: what trains.
        world_size: number of workers, which all call the same methods; the largest movement of any of them is given.
    """

    def __init__(self, trainable: TrainableExperts, *, world_size: int = 1) -> None:
        self._trainable, self._world_size = trainable, world_size
        self._watched: dict[int, _Watched] = {}
        self._has_warned = False

    @torch.no_grad()
    def begin(self, batch: BatchInTraining) -> None:
        """Asks for some tokens of the layers that none are known of yet; before the batch's passes."""
        for forward in batch.forwards:
            forward.keeps_probe = forward.layer.layer not in self._watched

    @torch.no_grad()
    def take(self, batch: BatchInTraining) -> None:
        """Keeps them, and what the experts make of them; after the batch's passes and before the update."""
        for forward in batch.forwards:
            if forward.probe is not None:
                before_TH = forward.trained_output(forward.probe)
                if before_TH.any():
                    self._watched[forward.layer.layer] = _Watched(forward, forward.probe, before_TH)
                forward.keeps_probe, forward.probe = False, None

    @torch.no_grad()
    def after_step(self, *, what: str) -> Movement:
        """The movement after an update.

        Args:
            what: of the step and its rate, for the warning.
        """
        layers = self._trainable.moe_layers
        device = next(layers[0].experts.parameters()).device
        moved_L = torch.zeros(len(layers), dtype=torch.float64, device=device)
        for layer, watched in self._watched.items():
            moved_L[layers.row_of(layer)] = self._moved(watched).to(moved_L.device)
        if self._world_size > 1:
            dist.all_reduce(moved_L, op=dist.ReduceOp.MAX)
        moved = tuple(moved_L.tolist())
        warning = ""
        if max(moved) > LIMIT and not self._has_warned:
            self._has_warned = True
            warning = _warning(moved, layers.layers, what)
            logger.warning("%s", warning)
        return Movement(moved, warning)

    def _moved(self, watched: _Watched) -> Tensor:
        layer = watched.forward.layer
        # A parametrisation may give other tensors after a step, so the forward is made anew.
        tensors = [self._trainable.tensors_of(Expert(layer.layer, expert)) for expert in watched.forward.experts]
        now = trained_forward(layer, watched.forward.experts, tensors, only_these=True)
        before_TH = watched.before_TH.double()
        moved = (now.trained_output(watched.probe).double() - before_TH).norm() / before_TH.norm()
        return torch.where(moved.isfinite(), moved, torch.inf)


def _warning(moved: Sequence[float], layers: Sequence[int], what: str) -> str:
    most = max(range(len(moved)), key=lambda row: moved[row])
    return (
        f"fine-tuning, {what}: the outputs of the experts that train in layer {layers[most]} have moved by "
        f"{moved[most]:.1f} times their own norm, expected less than {LIMIT:g} in the first steps; such experts do "
        "something else than those that were found, so lower finetune.learning_rate (1e-5 to 5e-5 suit real models)"
    )

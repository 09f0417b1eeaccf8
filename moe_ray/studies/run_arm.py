"""One arm of a comparison on a model in memory: trained, measured on the way, and undone bit for bit.

Shape suffixes: L MoE layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.evaluation.evaluate import answer_examples
from moe_ray.experts import ExpertMasks, Mask
from moe_ray.finetuning.low_rank import low_rank, num_expert_parameters, rank_of_about
from moe_ray.finetuning.parameter_groups import Parameters, nearest_in_number, parameters_of
from moe_ray.finetuning.step_report import StepReport
from moe_ray.finetuning.trainable_experts import whole_experts
from moe_ray.finetuning.trainer import MaskedTrainer
from moe_ray.models.token_budget import TokenBudget
from moe_ray.prompts.batches import Batch
from moe_ray.studies.baseline_masks import masks_around
from moe_ray.studies.baselines import TRANSFER, Arm
from moe_ray.studies.measured import Measured
from moe_ray.studies.trial import Measure, TrialOutcome, run_trial, run_trial_of


@dataclass(frozen=True, kw_only=True)
class ArmOutcome:
    """What an arm gave.

    Attributes:
        measured: by share of its steps, ascending, the last of them 1.
        steps: done at each of these shares; all 0 for an arm that trains nothing.
        trainable_parameters: numbers that were allowed to change.
        rank: of low-rank differences; 0 = there are none.
        losses: per step, the mean loss over the batch's target-response tokens (nats per token).
        train_seconds: of fine-tuning alone.
        evaluate_seconds: of the last measurement.
    """

    measured: Mapping[float, Measured]
    steps: Mapping[float, int]
    trainable_parameters: int
    rank: int
    losses: tuple[float, ...]
    train_seconds: float
    evaluate_seconds: float

    def __repr__(self) -> str:
        return f"ArmOutcome({len(self.losses)} steps, measured at {', '.join(f'{share:g}' for share in self.measured)})"


class Curve:
    """Measurements on the way through a training.

    Args:
        shares: of the steps after which the model is measured, ascending, the last of them 1.
        measure: of the model as it is now.

    Attributes:
        measured: so far, by number of steps.
        num_steps: of the training, known after its first step.
    """

    def __init__(self, shares: Sequence[float], measure: Measure) -> None:
        self._shares, self._measure = shares, measure
        self.measured: dict[int, Measured] = {}
        self.num_steps = 0

    def after(self, step: int, num_steps: int) -> None:
        """Measures where a share ends with this step; the end of the training is measured by whoever ran it.

        Args:
            step: how many are done.
            num_steps: of the training.
        """
        self.num_steps = num_steps
        if step < num_steps and step in self._steps().values():
            self.measured[step] = self._measure()

    def by_share(self, end: Measured) -> tuple[dict[float, Measured], dict[float, int]]:
        """Measurements and steps by share; shares that end with the same step have one measurement."""
        steps = self._steps()
        return {share: self.measured.get(step, end) for share, step in steps.items()}, steps

    def _steps(self) -> dict[float, int]:
        # Less than any share of a step: 0.1 x 30 is 3.0000000000000004.
        return {share: max(1, math.ceil(share * self.num_steps - 1e-9)) for share in self._shares}


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """What all arms have in common.

    Attributes:
        model: the base model.
        tokenizer: its tokenizer.
        batches: with a target for every example.
        test: held-out examples, see `answer_examples`.
        evaluate: sizes and the judge.
        measure: of the model as it is now, under natural routing.
        shares: of the steps after which every arm is measured, ascending, the last of them 1.
        union_LE: (L, E) union of the per-batch masks, whose number of parameters is the budget.
        trained_batches: `batch_idx`s that arms without masks train on.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    batches: Sequence[Batch]
    test: pd.DataFrame
    evaluate: EvaluateConfig
    measure: Measure
    shares: Sequence[float]
    union_LE: Mask
    trained_batches: Collection[int]

    def __repr__(self) -> str:
        return f"Trainer({len(self.batches)} batches, {len(self.test)} held-out examples)"

    def run(self, arm: Arm, *, seed: int) -> ArmOutcome:
        """Trains and measures an arm; the model ends as it was, also after an error.

        Args:
            arm: from `plan_arms`.
            seed: of the batch order.

        Raises:
            InputError: the model has nothing of what the arm trains.
            NotTrainable: the gradient is not finite.
        """
        # How far a category's training reaches is asked of its end alone.
        shares = self.shares[-1:] if arm.kind == TRANSFER else self.shares
        if arm.learns == "nothing":
            measured = self.measure() if arm.masks is None else self._measure_around(arm.masks)
            return ArmOutcome(
                measured=dict.fromkeys(shares, measured),
                steps=dict.fromkeys(shares, 0),
                trainable_parameters=0,
                rank=0,
                losses=(),
                train_seconds=0.0,
                evaluate_seconds=0.0,
            )
        curve = Curve(shares, self.measure)
        rank = 0
        if arm.masks is None:
            outcome = self._run_parameters(arm, curve, seed)
        else:
            rank = self._rank(arm, arm.masks)
            outcome = self._run_experts(arm, arm.masks, rank, curve, seed)
        measured_by_share, steps = curve.by_share(outcome.measured)
        return ArmOutcome(
            measured=measured_by_share,
            steps=steps,
            trainable_parameters=outcome.trainable_parameters,
            rank=rank,
            losses=outcome.losses,
            train_seconds=outcome.train_seconds,
            evaluate_seconds=outcome.evaluate_seconds,
        )

    def _run_experts(self, arm: Arm, masks: ExpertMasks, rank: int, curve: Curve, seed: int) -> TrialOutcome:
        def after_step(trainer: MaskedTrainer, report: StepReport) -> None:
            curve.after(trainer.next_step, len(trainer.plan))

        return run_trial(
            self.model,
            self.tokenizer,
            self.batches,
            masks,
            config=arm.train,
            seed=seed,
            measure=self.measure,
            after_step=after_step,
            parametrisation=low_rank(rank) if rank else whole_experts,
        )

    def _run_parameters(self, arm: Arm, curve: Curve, seed: int) -> TrialOutcome:
        return run_trial_of(
            self.model,
            self.tokenizer,
            self.batches,
            chosen=self._chosen(arm),
            only=self.trained_batches,
            config=arm.train,
            seed=seed,
            measure=self.measure,
            after_step=curve.after,
        )

    def _chosen(self, arm: Arm) -> Parameters:
        group = arm.learns
        assert group in ("attention", "router", "all"), "experts and low-rank differences of them have masks"
        parameters = parameters_of(self.model, group)
        return nearest_in_number(parameters, self._budget()) if arm.is_matched else parameters

    def _rank(self, arm: Arm, masks: ExpertMasks) -> int:
        if arm.learns != "low_rank":
            return 0
        return arm.rank or rank_of_about(self.model, masks.union, self._budget())

    def _budget(self) -> int:
        return num_expert_parameters(self.model, self.union_LE)

    def _measure_around(self, masks: ExpertMasks) -> Measured:
        """The base model with every prompt routed around the unsafe experts of its reference batch.

        Neutral text has no batch, so nothing is measured on it.
        """
        around = masks_around(masks, self.test["batch_idx"].unique().tolist())
        answers = answer_examples(
            self.model,
            self.tokenizer,
            self.test,
            replace(self.evaluate, routing=("masked",)),
            around,
            budget=TokenBudget(self.evaluate.tokens_per_forward),
        )
        # As the other arms' are called: they are compared with these.
        return Measured(answers=answers.assign(routing="natural"), neutral=None)

"""One trial: fine-tune the base model, measure it, and put the base back, all in one process.

Trials of a sweep and baselines run one after another on the same loaded model; what each changed is undone bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.config.finetune import FinetuneConfig
from moe_ray.config.identify import IdentifyConfig
from moe_ray.evaluation.evaluate import answer_examples
from moe_ray.experts import ExpertMasks
from moe_ray.finetuning.adapter import experts_restored
from moe_ray.finetuning.batch_rows import BatchesInMemory, BatchSource, learning_rows
from moe_ray.finetuning.fine_tune import FineTuned, configured_weights, fine_tune, learned_parts
from moe_ray.finetuning.full_fine_tune import parameters_restored, tune_parameters
from moe_ray.finetuning.parameter_groups import Parameters
from moe_ray.finetuning.step_report import StepReport
from moe_ray.finetuning.trainable_experts import Parametrisation, whole_experts
from moe_ray.finetuning.trainer import MaskedTrainer
from moe_ray.identification.identify import identify
from moe_ray.identification.risk import batches_with_both_labels
from moe_ray.identification.selection import select, select_from
from moe_ray.models.loss import text_losses
from moe_ray.models.token_budget import TokenBudget
from moe_ray.models.tokenization import pad_token_id
from moe_ray.prompts.batches import Batch
from moe_ray.prompts.examples import Example
from moe_ray.routing.count_store import batches_in_parts, parts_info, plan_reads, read_batches
from moe_ray.routing.counts import RoutingCounts
from moe_ray.storage.folder import Folder
from moe_ray.studies.measured import Measured

Measure = Callable[[], Measured]
"""Measures the model as it is now."""

_EXPERTS_AT_ONCE = 200_000
"""Batches times experts of all layers that are identified at a time: some megabytes of counts and of risk table."""


def measurer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    frame: pd.DataFrame,
    config: EvaluateConfig,
    neutral_texts: Sequence[str] = (),
) -> Measure:
    """A function that measures the model on held-out examples, under natural routing.

    Args:
        model: in memory.
        tokenizer: its tokenizer.
        frame: held-out examples, see `answer_examples`.
        config: sizes and the judge; its `routing` is not used.
        neutral_texts: whose loss shows what was forgotten.
    """
    natural, budget = replace(config, routing=("natural",)), TokenBudget(config.tokens_per_forward)

    def measure() -> Measured:
        neutral = None
        if neutral_texts:
            neutral = text_losses(model, tokenizer, neutral_texts, budget=budget)
        return Measured(answers=answer_examples(model, tokenizer, frame, natural, budget=budget), neutral=neutral)

    return measure


@dataclass(frozen=True, kw_only=True)
class TrialOutcome:
    """What a trial gave.

    Attributes:
        measured: what `measure` returned at the end.
        trainable_parameters: numbers that were allowed to change.
        frozen_parameters_changed: numbers in frozen tensors whose bytes changed: 0, as anything else raises.
        losses: per step done now, the mean loss over the batch's target-response tokens (nats per token).
        train_seconds: of fine-tuning, without what `after_step` took.
        evaluate_seconds: of the last measurement.
    """

    measured: Measured
    trainable_parameters: int
    frozen_parameters_changed: int
    losses: tuple[float, ...]
    train_seconds: float
    evaluate_seconds: float

    def __repr__(self) -> str:
        steps = f"{len(self.losses)} steps in {self.train_seconds:.1f} s"
        return f"TrialOutcome({steps}, {self.trainable_parameters:,} trainable, {self.measured!r})"


def identify_masks(counts: RoutingCounts, selection: IdentifyConfig, *, seed: int) -> ExpertMasks:
    """The masks that a run with these settings would train, from stored counts alone.

    What only says how sure a selection is, and does not change it, is left out; this is what makes a trial's identification
    take a fraction of a second.

    Raises:
        InputError: no batch has any unsafe expert.
    """
    needed = only_what_selects(selection)
    return select(identify(counts, needed, seed=seed), needed, seed=seed)


def identify_stored_masks(parts: Folder, selection: IdentifyConfig, *, seed: int) -> ExpertMasks:
    """The masks that `identify_masks` gives for all stored counts, of which some batches' are held at a time.

    Batches with tokens of one label only get no mask, as in a run.

    Args:
        parts: of a finished capture.
        selection: what is selected.
        seed: of what is drawn.

    Raises:
        InputError: no batch has any unsafe expert, or none has tokens of both labels.
    """
    needed = only_what_selects(selection)
    return select_from(_risk_tables(parts, needed, seed), needed, seed=seed)


def _risk_tables(parts: Folder, config: IdentifyConfig, seed: int) -> Iterator[pd.DataFrame]:
    """Yields the risk tables of some batches at a time, ascending, each batch once."""
    info, where = parts_info(parts), batches_in_parts(parts, config.roles)
    where = where[where["batch_idx"].isin(batches_with_both_labels(where, config.roles))]
    size = max(1, _EXPERTS_AT_ONCE // (len(info.layers) * info.num_experts))
    for batches, names in plan_reads(where, batches_at_once=size):
        yield identify(read_batches(parts, names, batches), config, seed=seed)


def only_what_selects(selection: IdentifyConfig) -> IdentifyConfig:
    """The same selection without the statistics that it does not use."""
    return replace(
        selection,
        permutations=selection.permutations if selection.alpha else 0,
        resamples=selection.resamples if selection.stability else 0,
    )


def in_one_process(config: FinetuneConfig) -> FinetuneConfig:
    """The same training with one worker: as many batches in a step as its workers would have taken."""
    of_a_step = config.batches_per_step or max(1, config.num_workers)
    return replace(config, batches_per_step=of_a_step, num_workers=1, shard="none")


def run_trial(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Sequence[Batch] | BatchSource,
    masks: ExpertMasks,
    *,
    config: FinetuneConfig,
    seed: int,
    measure: Measure,
    validation: Sequence[Example] = (),
    resume_from: str | Path | None = None,
    after_step: Callable[[MaskedTrainer, StepReport], None] | None = None,
    base: str = "",
    keep: Callable[[Path, FineTuned], None] | None = None,
    parametrisation: Parametrisation = whole_experts,
) -> TrialOutcome:
    """Fine-tuning of the union in the base model, measured; the model ends as it was, also after an error.

    Args:
        model: the base model.
        tokenizer: its tokenizer.
        batches: with a target for every example, or where they are read from.
        masks: by `batch_idx`.
        config: hyperparameters.
        seed: of the batch order.
        measure: called once when training is done.
        validation: what `config.patience` watches.
        resume_from: folder of a training checkpoint.
        after_step: called with the trainer and the report of each step; `measure` may be called there too.
        base: the base model's name, written into the adapter.
        keep: called with a local folder that holds the learned experts while it is called, and what the training did; None =
            they are not written.
        parametrisation: what is learned of the union's experts; `keep` takes whole experts only.
    """
    clock = _Clock(after_step)
    with experts_restored(model, learned_parts(masks, config)), TemporaryDirectory() as adapter:
        started = time.perf_counter()
        tuned = fine_tune(
            model,
            tokenizer,
            batches,
            masks,
            config=in_one_process(config),
            seed=seed,
            validation=validation if config.patience else (),
            resume_from=resume_from,
            after_step=clock,
            adapter=None if keep is None else adapter,
            base=base,
            parametrisation=parametrisation,
        )
        train_seconds = time.perf_counter() - started - clock.seconds
        if keep is not None:
            keep(Path(adapter), tuned)
        measuring = time.perf_counter()
        measured = measure()
        return TrialOutcome(
            measured=measured,
            trainable_parameters=tuned.trainable_parameters,
            frozen_parameters_changed=tuned.frozen_parameters_changed,
            losses=tuple(report.loss for report in tuned.reports),
            train_seconds=train_seconds,
            evaluate_seconds=time.perf_counter() - measuring,
        )


def run_trial_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Sequence[Batch],
    *,
    chosen: Parameters,
    only: Collection[int],
    config: FinetuneConfig,
    seed: int,
    measure: Measure,
    after_step: Callable[[int, int], None] | None = None,
) -> TrialOutcome:
    """Fine-tuning of given parameters of the base model, measured; the model ends as it was, also after an error.

    Args:
        model: the base model.
        tokenizer: its tokenizer.
        batches: with a target for every example.
        chosen: the parameters that train, by name.
        only: the `batch_idx`s to train on.
        config: hyperparameters.
        seed: of the batch order.
        measure: called once when training is done.
        after_step: called with the number of steps that are done and of all; `measure` may be called there too.
    """
    config, clock = in_one_process(config), _Clock(after_step)
    known = BatchesInMemory(batches).survey(only, lengths=config.batches_per_step > 1)
    rows = {
        batch.batch_idx: learning_rows(tokenizer, batch, config.learn_from)
        for batch in batches
        if batch.batch_idx in only
    }
    with parameters_restored(model, chosen):
        started = time.perf_counter()
        tuned = tune_parameters(
            model,
            rows,
            chosen=chosen,
            config=config,
            pad_id=pad_token_id(tokenizer),
            seed=seed,
            lengths=known.lengths or None,
            batch_weights=configured_weights(config.batch_weights, known.categories),
            after_step=clock,
        )
        train_seconds = time.perf_counter() - started - clock.seconds
        measuring = time.perf_counter()
        measured = measure()
        return TrialOutcome(
            measured=measured,
            trainable_parameters=tuned.trainable_parameters,
            frozen_parameters_changed=tuned.frozen_parameters_changed,
            losses=tuned.losses,
            train_seconds=train_seconds,
            evaluate_seconds=time.perf_counter() - measuring,
        )


class _Clock:
    """Calls a function, if there is one, and knows the seconds that this took."""

    def __init__(self, function: Callable[..., None] | None) -> None:
        self._function, self.seconds = function, 0.0

    def __call__(self, *args: Any) -> None:
        began = time.perf_counter()
        if self._function is not None:
            self._function(*args)
        self.seconds += time.perf_counter() - began

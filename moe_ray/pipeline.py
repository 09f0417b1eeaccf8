"""The pipeline in one process, without Ray: prompts to batches, counts, unsafe experts, learned experts and figures.

Each function is the stage of a run that has its name, with the run's defaults. Its settings are those of the stage's
section of the configuration, given as that section's object, as keywords, or as keywords on top of the object; those that
are about processes and GPUs have no meaning here.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_ray.ablation.ablate import Ablation, ablate_batches
from moe_ray.ablation.plan import chosen_batches, plan_batches, prompts_of_batches
from moe_ray.config.ablate import AblateConfig
from moe_ray.config.capture import CaptureConfig
from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.config.finetune import FinetuneConfig
from moe_ray.config.identify import IdentifyConfig
from moe_ray.config.prompts import PromptsConfig
from moe_ray.config.run import Config
from moe_ray.config.scores import measured_for
from moe_ray.errors import InputError
from moe_ray.evaluation.evaluate import assign_reference_batches
from moe_ray.evaluation.held_out import NO_BATCH, Evaluation, evaluate_held_out
from moe_ray.evaluation.own_answers import OwnAnswers, refusals_warning
from moe_ray.evaluation.target_check import refuse_complying_targets, refuse_targets_without_answer
from moe_ray.experts import ExpertMasks, ShortLayers
from moe_ray.finetuning.callbacks import Callback
from moe_ray.finetuning.fine_tune import FineTuned
from moe_ray.finetuning.fine_tune import fine_tune as fine_tune_experts
from moe_ray.finetuning.kept_checkpoints import KeepCheckpoints, newest_checkpoint
from moe_ray.finetuning.step_report import StepReport
from moe_ray.finetuning.targets import with_targets, without_unaskable
from moe_ray.finetuning.trainer import MaskedTrainer
from moe_ray.identification.identify import Identification
from moe_ray.identification.identify import identify as risk_of_batches
from moe_ray.identification.risk import batches_with_both_labels, label_tokens
from moe_ray.identification.risk_tables import Risk
from moe_ray.identification.selection import ranking_column, select
from moe_ray.models.generation import Response
from moe_ray.models.moe_layers import find_moe_layers
from moe_ray.progress import Progress, shown
from moe_ray.prompts.batches import Batch
from moe_ray.prompts.example_tables import batches_to_frame, examples_to_frame
from moe_ray.prompts.examples import Example
from moe_ray.prompts.prompt_set import Prompts, group_examples
from moe_ray.routing.capture_batches import capture_batches
from moe_ray.routing.counts import RoutingCounts
from moe_ray.studies.trial import in_one_process

logger = logging.getLogger(__name__)

T = TypeVar("T")


def prepare(
    examples: Sequence[Example],
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    config: PromptsConfig | None = None,
    seed: int = 0,
    capture_config: CaptureConfig | None = None,
    **settings: Any,
) -> Prompts:
    """The examples split, grouped into batches, and with a target where one can be had.

    Unsafe examples without a target get `prompts.refusal`. Safe ones get the model's own answer if a model is given.
    Examples that it cannot be asked (too long, or refused by the chat template) are then left out of the held-out ones and
    named in a warning; those of batches stay in place, and `capture` and `fine_tune` leave them out.

    Args:
        examples: from `read_examples`.
        model: the base model, in memory.
        tokenizer: its tokenizer.
        config: the section `prompts`; `files` is not used.
        seed: of splits and batches.
        capture_config: the section `capture`, whose `too_long` and `max_bad_share` also hold for held-out examples.
        settings: of the section, such as `unsafe_per_batch=16`.

    Raises:
        InputError: a target is a thought without an answer, most targets of unsafe examples refuse nothing, a label is
            missing in training or test, no batch can be filled, or more than `capture.max_bad_share` of the held-out
            examples cannot be asked.
    """
    chosen = _merged(PromptsConfig, config, settings)
    if chosen.keep_pairs != "all":
        raise InputError(
            f"prompts.keep_pairs={chosen.keep_pairs}: which pairs are kept takes judged answers to all of them; let a run "
            "find them (moe-ray prepare), or give only the examples to keep"
        )
    refuse_targets_without_answer(examples)
    if not chosen.allow_complying_targets:
        refuse_complying_targets(examples)
    prompts = group_examples(examples, Config(prompts=chosen, seed=seed))
    return with_targets(prompts, chosen, model, tokenizer, capture_config)


def capture(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Sequence[Batch],
    *,
    config: CaptureConfig | None = None,
    identify_config: IdentifyConfig | None = None,
    seed: int = 0,
    progress: bool | Progress = False,
    **settings: Any,
) -> RoutingCounts:
    """Which experts each example's tokens are really routed to; the model answers examples without a `response` itself.

    Args:
        model: a causal language model; its training mode is restored afterwards.
        tokenizer: its tokenizer; the chat template is applied where there is one.
        batches: of `prepare`.
        config: the section `capture`.
        identify_config: the section `identify` that the counts are for; what it needs is measured as well.
        seed: of generated responses.
        progress: True shows a bar; a callback gets (done, total) examples.
        settings: of the section, such as `weights=True`, or `scores=["attribution"]` for the rules that rank by a score.

    Raises:
        InputError: see `capture_batches`.
    """
    chosen = measured_for(_merged(CaptureConfig, config, settings), identify_config or IdentifyConfig())
    totals = OwnAnswers()

    def on_answer(example: Example, answer: Response) -> None:
        totals.add(example.label, answer.text, len(answer.ids), ended=answer.ended)

    with shown(progress, "capture") as show:
        counts = capture_batches(model, tokenizer, batches, chosen, seed=seed, progress=show, on_answer=on_answer)
    if warning := refusals_warning(totals.as_dict()):
        logger.warning("capture: %s", warning)
    return counts


def identify(
    counts: RoutingCounts, *, config: IdentifyConfig | None = None, seed: int = 0, **settings: Any
) -> Identification:
    """The unsafe experts of every batch, and how sure each is; a batch without tokens of both labels gets no mask.

    Args:
        counts: from `capture`.
        config: the section `identify`.
        seed: of drawn relabellings and resamples, and of rule `random`.
        settings: of the section, such as `threshold=0.1, top_k=20`, or `rule="attribution"`.

    Raises:
        InputError: no batch has any unsafe expert or both labels, the settings need what was not captured, or a batch lacks
            the answers that the rule compares.
    """
    chosen = _merged(IdentifyConfig, config, settings)
    whole = batches_with_both_labels(label_tokens(counts, chosen.roles), chosen.roles)
    chosen_rows = np.isin(counts.batch_idx, whole)
    if not chosen_rows.all():
        counts = counts.take(chosen_rows)
    risk = risk_of_batches(counts, chosen, seed=seed)
    return Identification(risk=risk, masks=select(risk, chosen, seed=seed), config=chosen)


def ablate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Sequence[Batch],
    masks: ExpertMasks,
    risk: Risk,
    *,
    held_out: Sequence[Example] = (),
    ranked_by: str = "",
    config: AblateConfig | None = None,
    seed: int = 0,
    progress: bool | Progress = False,
    **settings: Any,
) -> Ablation:
    """Whether the batches' unsafe experts are what the model's unsafe answers come from: tokens are routed around them.

    Args:
        model: the base model, in memory; its training mode is restored afterwards.
        tokenizer: its tokenizer.
        batches: of `prepare`.
        masks: of `identify`.
        risk: of `identify`, for the shares of tokens that controls are matched by.
        held_out: examples of the batches' categories that did not choose the experts, such as `prepare(...).validation`;
            batches that have too few of them are asked their own.
        ranked_by: the column of `risk` by whose mean the one list for all batches is made, see `ranking_column`; empty =
            that of the default selection where `risk` has it, else `risk_diff`.
        config: the section `ablate`; `run` is not used.
        seed: of draws and relabellings.
        progress: True shows a bar; a callback gets (done, total) batches.
        settings: of the section, such as `draws=20`.

    Raises:
        NothingSelected: no batch has an expert that tokens can be routed around, or prompts of both labels.
        InputError: the model's experts cannot be masked.
    """
    chosen = _merged(AblateConfig, config, settings)
    categories = {batch.batch_idx: batch.category for batch in batches}
    if missing := sorted(set(masks.batch_idx) - set(categories)):
        raise InputError(f"masks of batches {missing[:20]}, which `batches` lacks; give the batches of these masks")
    picked = chosen_batches(masks, categories, chosen.max_batches)
    prompts = prompts_of_batches(
        {batch: categories[batch] for batch in picked},
        batches_to_frame(without_unaskable(batches, model, tokenizer)),
        examples_to_frame(held_out) if held_out else None,
        chosen,
        seed=seed,
    )
    usual = ranking_column(IdentifyConfig())
    plans = plan_batches(
        *(prompts, masks, risk, categories, chosen),
        num_experts_per_tok=find_moe_layers(model).num_experts_per_tok,
        seed=seed,
        column=ranked_by or (usual if usual in risk else "risk_diff"),
    )
    with shown(progress, "ablation") as show:
        return ablate_batches(model, tokenizer, plans, chosen, seed=seed, progress=show)


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Sequence[Batch],
    masks: ExpertMasks,
    *,
    config: FinetuneConfig | None = None,
    seed: int = 0,
    adapter: str | Path | None = None,
    base: str = "",
    validation: Sequence[Example] = (),
    callbacks: Sequence[Callback] = (),
    checkpoints: str | Path | None = None,
    progress: bool | Progress = False,
    **settings: Any,
) -> FineTuned:
    """Trains the union of the batches' unsafe experts, each step under the mask of the batch it trains.

    The model ends with the learned weights in place; everything outside the union is bit-identical to the start.

    Args:
        model: the base model.
        tokenizer: its tokenizer.
        batches: with a target for every example that the model can be asked; the others, and batches without a mask, are
            not trained.
        masks: of `identify`, looked up by `batch_idx`.
        config: the section `finetune`.
        seed: of the batch order.
        adapter: folder to save the learned experts in; None = do not save.
        base: the base model's name, written into the adapter.
        validation: examples with a target, whose loss `patience` watches.
        callbacks: told of the start, of steps, epochs and checkpoints, and of the end; see `Callback`.
        checkpoints: folder to keep the newest training checkpoint in, one an epoch or as `checkpoint_every` says; a training
            that was ended goes on from it. None = keep none.
        progress: True shows a bar; a callback gets (done, total) steps.
        settings: of the section, such as `epochs=2, learning_rate=1e-3`.

    Raises:
        InputError: an example has no target, or the checkpoint is of other masks or batches.
        NotTrainable: the gradient is not finite.
        NothingSelected: no mask has any expert.
        FrozenChanged: something outside the union changed; nothing was saved.
    """
    chosen = in_one_process(_merged(FinetuneConfig, config, settings))
    keep = [] if checkpoints is None else [KeepCheckpoints(checkpoints, every=chosen.checkpoint_every, told=callbacks)]
    with shown(progress, "fine-tuning") as show:

        def after_step(trainer: MaskedTrainer, report: StepReport) -> None:
            show(trainer.next_step, len(trainer.plan))

        return fine_tune_experts(
            model,
            tokenizer,
            without_unaskable(batches, model, tokenizer),
            masks,
            config=chosen,
            seed=seed,
            adapter=adapter,
            base=base,
            validation=validation,
            resume_from=None if checkpoints is None else newest_checkpoint(checkpoints),
            after_step=after_step,
            callbacks=[*callbacks, *keep],
        )


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batches: Sequence[Batch] = (),
    masks: ExpertMasks | None = None,
    before: Evaluation | None = None,
    config: EvaluateConfig | None = None,
    short_layers: ShortLayers = "allowed_only",
    progress: bool | Progress = False,
    **settings: Any,
) -> Evaluation:
    """Answers to held-out examples, judged, with rates and losses and their intervals.

    Args:
        model: in memory; its training mode is restored afterwards.
        tokenizer: its tokenizer.
        examples: held out, such as `prepare(...).test`; those without a target have no target loss.
        batches: of training, each of which stands for some of the examples; without them there are no figures per batch.
        masks: of the batches; needed where `routing` is not natural alone.
        before: of the base model on the same examples, to compare with.
        config: the section `evaluate`.
        short_layers: for other than natural routing, the policy that training has (`finetune.short_layers`).
        progress: True shows a bar; a callback gets (done, total) answers.
        settings: of the section, such as `max_new_tokens=64`.

    Raises:
        InputError: other than natural routing without batches and masks, a judge that cannot be had, or `before` is of other
            examples.
    """
    chosen = _merged(EvaluateConfig, config, settings)
    if (others := set(chosen.routing) - {"natural"}) and not batches:
        raise InputError(f"evaluate.routing={min(others)} routes through batches' masks; give `batches` and `masks`")
    if chosen.engine != "transformers":
        raise InputError(f"evaluate.engine={chosen.engine} is a run's; a model in memory is run by transformers")
    frame = examples_to_frame(examples)
    frame["batch_idx"] = assign_reference_batches(frame, batches_to_frame(batches)) if batches else NO_BATCH
    with shown(progress, "evaluation") as show:
        return evaluate_held_out(
            model, tokenizer, frame, chosen, masks, before=before, short_layers=short_layers, progress=show
        )


def _merged(kind: type[T], config: T | None, settings: Mapping[str, Any]) -> T:
    """The section with the given settings on top.

    Raises:
        InputError: it has no such setting; the message names the nearest one.
    """
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else f"; expected some of {', '.join(sorted(known))}"
            raise InputError(f"{name}: no setting of {kind.__name__}{hint}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    return replace(config or kind(), **values)  # type: ignore[type-var]

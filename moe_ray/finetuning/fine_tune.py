"""Fine-tuning a model on its batches, from text to learned experts: what one worker does, with or without Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.config.finetune import FinetuneConfig
from moe_ray.errors import InputError, NotTrainable
from moe_ray.experts import Expert, ExpertMasks, Router, masks_from_experts
from moe_ray.finetuning.adapter import (
    apply_adapter,
    compose_adapters,
    expert_weights,
    save_adapter,
)
from moe_ray.finetuning.adapter_files import parts_of, read_adapter_header
from moe_ray.finetuning.adapter_tensors import Part, hash_weights
from moe_ray.finetuning.batch_rows import BatchesInMemory, BatchRows, BatchSource, target_rows
from moe_ray.finetuning.callbacks import Callback, Callbacks
from moe_ray.finetuning.checkpoint import load_checkpoint
from moe_ray.finetuning.frozen import check_unchanged, hash_frozen
from moe_ray.finetuning.mask_check import check_routing
from moe_ray.finetuning.step_report import StepReport
from moe_ray.finetuning.trainable_experts import Parametrisation, trainable_experts, whole_experts
from moe_ray.finetuning.trainer import MaskedTrainer
from moe_ray.models.expert_codes import num_weights
from moe_ray.models.loss import target_losses
from moe_ray.models.sharded_storage import is_sharded
from moe_ray.models.token_budget import TokenBudget
from moe_ray.models.tokenization import pad_token_id
from moe_ray.prompts.batches import Batch
from moe_ray.prompts.examples import Example


@dataclass(frozen=True, kw_only=True)
class FineTuned:
    """What a fine-tuning did.

    Attributes:
        reports: of the steps run now, in order; a resumed run lacks those before.
        trainable_parameters: numbers that were allowed to change.
        total_parameters: numbers in the model.
        frozen_parameters_changed: numbers in frozen tensors whose bytes differ from the start: 0, as anything else raises.
    """

    reports: tuple[StepReport, ...]
    trainable_parameters: int
    total_parameters: int
    frozen_parameters_changed: int

    def __repr__(self) -> str:
        loss = f", last loss {self.reports[-1].loss:.4f}" if self.reports else ""
        trained = f"{self.trainable_parameters:,} of {self.total_parameters:,} parameters"
        return f"FineTuned({len(self.reports)} steps{loss}, {trained})"


def learned_parts(masks: ExpertMasks, config: FinetuneConfig) -> list[Part]:
    """What a training may change: the union's experts and, where routers learn too, the routers of all MoE layers."""
    routers = map(Router, masks.layers if config.router == "alternating" else ())
    return [*masks.union_experts, *routers]


def configured_weights(entries: Sequence[str], categories: Mapping[int, str]) -> dict[int, float]:
    """The weight of each batch that an entry names; an entry with the batch's index wins over one with its category.

    Args:
        entries: NAME=WEIGHT, NAME a `batch_idx` or a category.
        categories: of the run's batches, by `batch_idx`.

    Raises:
        NotTrainable: an entry names no batch.
    """
    named = {name: float(weight) for name, _, weight in (entry.rpartition("=") for entry in entries)}
    known = {str(batch_idx) for batch_idx in categories} | set(categories.values())
    unknown = sorted(named.keys() - known)
    if unknown:
        raise NotTrainable(
            f"finetune.batch_weights: got {unknown[0]!r}, expected a batch_idx or one of the categories "
            f"{sorted(set(categories.values()))}"
        )
    weights = {batch_idx: named.get(str(batch_idx), named.get(category)) for batch_idx, category in categories.items()}
    return {batch_idx: weight for batch_idx, weight in weights.items() if weight is not None}


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Sequence[Batch] | BatchSource,
    masks: ExpertMasks,
    *,
    config: FinetuneConfig | None = None,
    seed: int = 0,
    adapter: str | Path | None = None,
    base: str = "",
    rank: int = 0,
    world_size: int = 1,
    resume_from: str | Path | None = None,
    validation: Sequence[Example] = (),
    batch_weights: Mapping[int, float] | None = None,
    after_step: Callable[[MaskedTrainer, StepReport], None] | None = None,
    callbacks: Sequence[Callback] = (),
    parametrisation: Parametrisation = whole_experts,
) -> FineTuned:
    """Trains the union of the batches' unsafe experts, each step under the mask of the batch it trains.

    The model ends with the learned weights in place; everything outside the union is bit-identical to the start.

    Args:
        model: the base model.
        tokenizer: its tokenizer.
        batches: with a target for every example; of a source, each worker reads its own only.
        masks: from `select`, looked up by `batch_idx`.
        config: hyperparameters; None = the defaults.
        seed: of the batch order.
        adapter: folder to save the learned experts in; None = do not save.
        base: the base model's name, written into the adapter.
        rank: of this worker; rank 0 saves.
        world_size: number of workers; above 1 `torch.distributed` must be initialised.
        resume_from: folder of a training checkpoint.
        validation: examples with a target, whose mean loss per token under natural routing is what
            `config.patience` watches.
        batch_weights: per `batch_idx`, what its step is multiplied by, on top of `config.batch_weights`.
        after_step: called with the trainer and the report of each step.
        callbacks: told of the start, of steps and epochs, and of the end.
        parametrisation: what is learned of the union's experts; an adapter holds whole experts only.

    Raises:
        InputError: an example has no target.
        NotTrainable: a gradient or a learned weight is not finite; nothing of that step was saved.
        NothingSelected: no mask has any expert.
        FrozenChanged: something outside the union changed; nothing was saved.
    """
    settings = config or FinetuneConfig()
    source = BatchesInMemory(batches) if isinstance(batches, Sequence) else batches
    shares_steps = (settings.batches_per_step or world_size) > 1
    known = source.survey(masks.trained_batches, lengths=shares_steps)
    rows = BatchRows(tokenizer, source, known.categories, learn_from=settings.learn_from)
    routers_train = settings.router == "alternating"
    frozen_before = hash_frozen(model, masks.union, routers_train=routers_train)
    base_hash = hash_weights(expert_weights(model, learned_parts(masks, settings)))
    weights = configured_weights(settings.batch_weights, known.categories)
    for batch_idx, weight in (batch_weights or {}).items():
        weights[batch_idx] = weights.get(batch_idx, 1.0) * weight
    dtype = torch.float32 if settings.dtype == "float32" else model.dtype
    with (
        trainable_experts(model, masks.union, dtype=dtype, parametrisation=parametrisation) as experts,
        _activation_checkpointing(model, settings.activation_checkpointing),
    ):
        trainer = MaskedTrainer(
            model,
            experts,
            rows,
            masks,
            settings,
            pad_id=pad_token_id(tokenizer),
            seed=seed,
            rank=rank,
            world_size=world_size,
            batch_weights=weights,
            lengths=known.lengths if shares_steps else None,
            before_epoch=rows.load,
            validate=_validator(model, tokenizer, validation, settings) if validation else None,
            monitor=check_routing if settings.monitor else None,
        )
        if resume_from is not None:
            load_checkpoint(trainer, resume_from)
        told = Callbacks(callbacks)

        def report_step(report: StepReport) -> None:
            if after_step is not None:
                after_step(trainer, report)
            told.on_step_end(trainer, report)

        told.on_train_begin(trainer)
        reports = trainer.run(report_step)
        told.on_train_end(trainer, reports)
        # Before the adapter is written: experts learned beside a changed base would belong to no base that anyone has.
        frozen_after = hash_frozen(model, masks.union, routers_train=routers_train)
        frozen_parameters_changed = check_unchanged(
            frozen_before, frozen_after, over_processes=is_sharded(model), device=model.device
        )
        routers = trainer.routers
        if adapter is not None and rank == 0:
            save_adapter(
                adapter,
                experts,
                base=base,
                base_hash=base_hash,
                mask_hash=masks.digest(),
                routers=None if routers is None else routers.parameters,
            )
        trainable_parameters = experts.num_parameters() + sum(
            parameter.numel() for parameter in (routers.all_parameters() if routers else ())
        )
    return FineTuned(
        reports=tuple(reports),
        trainable_parameters=trainable_parameters,
        total_parameters=num_weights(model),
        frozen_parameters_changed=frozen_parameters_changed,
    )


@contextmanager
def _activation_checkpointing(model: PreTrainedModel, switch_on: bool) -> Iterator[None]:
    if not switch_on or model.is_activation_checkpointing:
        yield
        return
    model.activation_checkpointing_enable()
    try:
        yield
    finally:
        model.activation_checkpointing_disable()


def _validator(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], config: FinetuneConfig
) -> Callable[[], float]:
    """A function that gives the mean loss (nats per target token) of the examples under natural routing."""
    rows = target_rows(tokenizer, examples)
    num_tokens = sum(len(row.answer_ids) for row in rows)
    budget = TokenBudget(config.tokens_per_forward or EvaluateConfig().tokens_per_forward)

    def validate() -> float:
        losses = target_losses(model, rows, budget=budget, pad_id=pad_token_id(tokenizer))
        return sum(losses) / num_tokens

    return validate


def continue_fine_tuning(
    model: nn.Module,
    start: str | Path,
    out: str | Path,
    masks: ExpertMasks,
    tune: Callable[[str], FineTuned],
    *,
    config: FinetuneConfig,
    saves: bool,
) -> FineTuned:
    """Fine-tunes from where an adapter left the model; writes one adapter of the original base that holds both.

    Args:
        model: the original base.
        start: folder of the adapter to start from.
        out: folder of the adapter to write.
        masks: of this round.
        tune: fine-tunes the model as it then is and saves its adapter in the folder it is given.
        config: that `tune` trains with.
        saves: whether this worker writes `out`.

    Returns:
        what `tune` did, with trainable and frozen parameters counted against the original base: trainable is what either
        may have changed.

    Raises:
        InputError: `start` is of another base, or the model is sharded.
        FrozenChanged: something outside both unions changed; nothing was saved.
    """
    parts = dict.fromkeys([*parts_of(read_adapter_header(start)), *learned_parts(masks, config)])
    both = masks_from_experts(
        {0: [part for part in parts if isinstance(part, Expert)]},
        layers=masks.layers,
        num_experts=masks.masks_BLE.shape[2],
    )
    routers_train = any(isinstance(part, Router) for part in parts)
    if is_sharded(model):
        raise InputError("finetune.shard: got fsdp for a training that goes on from learned experts, expected none")
    frozen = hash_frozen(model, both.union, routers_train=routers_train)
    base_weights = expert_weights(model, parts)
    apply_adapter(model, start)
    with TemporaryDirectory() as continued:
        tuned = tune(continued)
        frozen_parameters_changed = check_unchanged(frozen, hash_frozen(model, both.union, routers_train=routers_train))
        if saves:
            compose_adapters([start, continued], out, base_weights=base_weights, mask_hash=masks.digest())
    return replace(
        tuned,
        trainable_parameters=sum(tensor.numel() for tensors in base_weights.values() for tensor in tensors.values()),
        frozen_parameters_changed=frozen_parameters_changed,
    )

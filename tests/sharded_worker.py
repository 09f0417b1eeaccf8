"""One of the workers that fine-tune a model that FSDP2 shards over them; started by test_sharded_training.py."""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from families import batch_masks, rows
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from moe_ray.config.finetune import FinetuneConfig
from moe_ray.config.model import ModelConfig
from moe_ray.errors import FrozenChanged, InputError
from moe_ray.finetuning.adapter import save_adapter
from moe_ray.finetuning.checkpoint import load_checkpoint, save_checkpoint
from moe_ray.finetuning.frozen import check_unchanged, hash_frozen
from moe_ray.finetuning.trainable_experts import trainable_experts
from moe_ray.finetuning.trainer import MaskedTrainer
from moe_ray.models.expert_storage import local_part
from moe_ray.models.loading import load_model
from moe_ray.models.loss import answer_loss
from moe_ray.models.moe_layers import find_moe_layers

EXPERTS = {7: [(0, 1), (0, 5), (0, 6), (1, 3)], 3: [(1, 0), (1, 4), (1, 7)], 9: [(1, 3), (1, 7)]}
"""The first layer that trains differs: 0 in one batch, 1 in the others."""
BATCHES = {
    7: rows((5, 4), (3, 2), (7, 3), seed=1),
    3: rows((4, 3), (6, 5), seed=2),
    9: rows((2, 6), (5, 1), (4, 4), (3, 3), seed=3),
}
"""Three, two and four rows, each of which is a pass: see `rows_per_forward`. Three batches in steps of 2 or 4 leave a worker
without one."""
KEPT = FinetuneConfig(
    routing="masked", epochs=2, learning_rate=1e-2, weight_decay=0.1, schedule="constant", rows_per_forward=1
)
CONFIGS = {
    "masked": KEPT,
    "natural": replace(KEPT, routing="natural"),
    "stopping": replace(KEPT, epochs=6, patience=1),
}
KILLED_AFTER = 1


@dataclass(frozen=True)
class Variant:
    """What is trained besides a plain OLMoE in float32."""

    family: str = "olmoe"
    dtype: str = "float32"
    checkpoints_activations: bool = False


PLAIN = Variant()
VARIANTS = {
    "bfloat16": Variant(dtype="bfloat16"),
    "checkpointed": Variant(checkpoints_activations=True),
    "qwen3_moe": Variant("qwen3_moe"),
    "gpt_oss": Variant("gpt_oss"),  # whose experts have biases, and tensors that are transposed
}


def folder_of(variant: Variant) -> str:
    """Where the family's checkpoint lies."""
    return f"model-{variant.family}"


@contextmanager
def activations_computed_again(model, switch_on):
    """In this context each layer's forward runs again in backward; gives how often that of the first experts ran."""
    ran = []
    handle = find_moe_layers(model)[0].experts.register_forward_pre_hook(lambda *_: ran.append(1))
    if switch_on:
        model.activation_checkpointing_enable()
    try:
        yield ran
    finally:
        handle.remove()


def validation_loss(model):
    """A function that gives the loss of one batch; it rises, as another one is learned."""

    def validate() -> float:
        with torch.no_grad():
            return -answer_loss(model, BATCHES[7], pad_id=0).sum().item()

    return validate


def trainer_of(model, trainable, name, rank, world_size, steps_of):
    """A trainer of the run, whose steps have as many batches as `steps_of`."""
    return MaskedTrainer(
        model,
        trainable,
        BATCHES,
        batch_masks(model, EXPERTS),
        replace(CONFIGS[name], batches_per_step=steps_of),
        pad_id=0,
        seed=0,
        rank=rank,
        world_size=world_size,
        validate=validation_loss(model) if name == "stopping" else None,
    )


class Killed(Exception):
    """Ends a training between two steps."""


def moments_of(trainer) -> int:
    """Numbers of AdamW's means that this process holds."""
    return sum(state[name].numel() for state in trainer.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))


def train(model, name, rank, world_size, steps_of, checkpoint=None, *, adapter=None, dies=False, moments=None):
    """Trains; returns losses and the learned weights by name; `moments` gets how many this process held."""

    def after_step(_report):
        if dies and trainer.next_step == KILLED_AFTER:
            save_checkpoint(trainer, checkpoint)
            raise Killed

    with trainable_experts(model, batch_masks(model, EXPERTS).union) as trainable:
        trainer = trainer_of(model, trainable, name, rank, world_size, steps_of)
        if checkpoint is not None and not dies:
            load_checkpoint(trainer, checkpoint)
        reports = trainer.run(after_step)
        if moments is not None:
            moments.append(moments_of(trainer))
        if adapter is not None and rank == 0:
            save_adapter(adapter, trainable, base="tiny", base_hash="", mask_hash="")
        learned = {
            f"{expert.layer}.{expert.expert}.{name}": tensor.detach().clone()
            for expert, tensors in trainable.parameters.items()
            for name, tensor in tensors.items()
        }
    return [report.loss for report in reports], learned


def share_of_bytes(model) -> float:
    """What this process holds of the model's bytes."""
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    held = sum(local_part(p).numel() * p.element_size() for p in model.parameters())
    return held / whole


def run(folder: Path, rank: int, world_size: int) -> None:
    """Everything that the tests look at, written into the folder."""
    told: dict = {}

    def load(variant=PLAIN):
        base = ModelConfig(path=str(folder / folder_of(variant)), dtype=variant.dtype)
        return load_model(base, num_shards=world_size)

    model = load()
    told["share"] = share_of_bytes(model)
    union_LE = batch_masks(model, EXPERTS).union
    before = hash_frozen(model, union_LE)
    told["moments"] = []
    told["masked"], learned = train(
        model, "masked", rank, world_size, world_size, adapter=folder / "adapter", moments=told["moments"]
    )
    save_file(learned, folder / f"masked-{rank}.safetensors")
    told["changed"] = check_unchanged(before, hash_frozen(model, union_LE), over_processes=True)
    save_file({n: p.full_tensor() for n, p in model.named_parameters()}, folder / f"model-{rank}.safetensors")

    # One number of one frozen expert, in the process that holds it: every one of them must hear of it.
    tensor = next(iter(find_moe_layers(model)[0].expert_tensors().values()))
    assert isinstance(tensor, DTensor)
    if (held := local_part(tensor, 7)) is not None:
        with torch.no_grad():
            held.view(-1)[0] += 1
    told["touched_here"] = held is not None
    try:
        check_unchanged(before, hash_frozen(model, union_LE), over_processes=True)
        told["heard"] = ""
    except FrozenChanged as error:
        told["heard"] = str(error)

    for name in ("natural", "stopping"):
        told[name], learned = train(load(), name, rank, world_size, world_size)
        save_file(learned, folder / f"{name}-{rank}.safetensors")

    try:
        train(load(), "masked", rank, world_size, world_size, folder / "checkpoint", dies=True)
    except Killed:
        dist.barrier()
    for name, checkpoint in (("resumed", "checkpoint"), ("resumed_from_one", "checkpoint-of-one")):
        told[name], learned = train(load(), "masked", rank, world_size, world_size, folder / checkpoint)
        save_file(learned, folder / f"{name}-{rank}.safetensors")

    for name, variant in VARIANTS.items():
        model = load(variant)
        with activations_computed_again(model, variant.checkpoints_activations) as ran:
            told[name], learned = train(model, "masked", rank, world_size, world_size)
        told[f"{name} ran"] = len(ran)
        save_file(learned, folder / f"{name}-{rank}.safetensors")

    with trainable_experts(model, union_LE) as trainable:
        CONFIGS["alternating"] = replace(KEPT, routing="natural", router="alternating")
        try:
            trainer_of(model, trainable, "alternating", rank, world_size, world_size)
        except InputError as error:
            told["alternating"] = str(error)
    Path(folder, f"told-{rank}.json").write_text(json.dumps(told), encoding="utf-8")


def main(folder: Path, rank: int, world_size: int) -> None:
    """Meets the other workers, trains with them and leaves."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "meeting"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    run(folder, rank, world_size)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

"""Training checkpoints: what was trained, optimiser state and the next step, as safetensors and JSON, never a pickle."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moe_ray.errors import InputError
from moe_ray.finetuning.schedule import hash_plan
from moe_ray.finetuning.trainer import MaskedTrainer

_TENSORS, _STATE = "training.safetensors", "training.json"
CHECKPOINT_FILES = (_TENSORS, _STATE)
"""The files of a checkpoint, in the order in which they are written."""


def save_checkpoint(trainer: MaskedTrainer, folder: str | Path) -> None:
    """Writes the trainer's state into an existing folder; the JSON part last."""
    tensors: dict[str, Tensor] = {}
    for index, (parameter, optimizer) in enumerate(_trained(trainer)):
        tensors[f"{index}.weight"] = parameter.detach()
        for name, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{index}.{name}"] = torch.as_tensor(value)
    # A folder that held an older state is unfinished until the new JSON is there.
    Path(folder, _STATE).unlink(missing_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, Path(folder, _TENSORS))
    state = {
        "next_step": trainer.next_step,
        "validation_losses": trainer.validation_losses,
        "masks": trainer.masks.digest(),
        "plan": hash_plan(trainer.plan),
    }
    Path(folder, _STATE).write_text(json.dumps(state), encoding="utf-8")


def steps_done(folder: str | Path) -> int:
    """How many steps a finished checkpoint has behind it."""
    return int(json.loads(Path(folder, _STATE).read_text(encoding="utf-8"))["next_step"])


def load_checkpoint(trainer: MaskedTrainer, folder: str | Path) -> None:
    """Puts a saved state into a trainer built from the same run.

    Raises:
        InputError: there is no finished checkpoint, or it was made with other masks or another order of batches.
    """
    if not Path(folder, _STATE).is_file():
        raise InputError(f"{str(folder)!r} holds no training checkpoint (no {_STATE}); start the training anew")
    state = json.loads(Path(folder, _STATE).read_text(encoding="utf-8"))
    if state["masks"] != trainer.masks.digest():
        raise InputError(
            "the training checkpoint belongs to other masks; remove the run's `finetune` folder to start anew"
        )
    if state["plan"] != hash_plan(trainer.plan):
        raise InputError(
            "the training checkpoint belongs to another order of batches: finetune.epochs, finetune.num_workers, "
            "finetune.length_window or seed differ; set them back, or remove the run's `finetune` folder to start anew"
        )
    # Not on one of the model's devices: layers may be spread over several, none of which has room for all of it.
    tensors = load_file(Path(folder, _TENSORS))
    trained = _trained(trainer)
    with torch.no_grad():
        for index, (parameter, optimizer) in enumerate(trained):
            parameter.copy_(tensors.pop(f"{index}.weight"))
            optimizer.state.pop(parameter, None)
    for key, tensor in tensors.items():
        index_text, _, name = key.partition(".")
        parameter, optimizer = trained[int(index_text)]
        # The step counter of the plain AdamW is on the CPU, that of the fused kernel beside the parameter. Layers may be on
        # several devices.
        on_cpu = name == "step" and not optimizer.defaults["fused"]
        optimizer.state[parameter][name] = tensor.to("cpu" if on_cpu else parameter.device)
    trainer.trainable.write_back(trainer.trainable.union_LE)
    if trainer.routers is not None:
        trainer.routers.write_back()
    trainer.next_step = state["next_step"]
    trainer.validation_losses = state["validation_losses"]


def _trained(trainer: MaskedTrainer) -> list[tuple[nn.Parameter, torch.optim.Optimizer]]:
    """Every parameter with its optimiser: the experts', then the routers' where they train."""
    trained: list[tuple[nn.Parameter, torch.optim.Optimizer]] = [
        (parameter, trainer.optimizer) for parameter in trainer.trainable.all_parameters()
    ]
    if trainer.routers is not None:
        trained += [(parameter, trainer.routers.optimizer) for parameter in trainer.routers.all_parameters()]
    return trained

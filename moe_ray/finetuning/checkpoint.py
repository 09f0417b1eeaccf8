"""Training checkpoints: what was trained, optimiser state and the next step, as safetensors and JSON, never a pickle."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from moe_ray.errors import InputError
from moe_ray.finetuning.schedule import hash_plan
from moe_ray.finetuning.tensor_files import DTYPES, TensorInfo, first_not_finite, read_tensors, tensor_infos
from moe_ray.finetuning.trainer import MaskedTrainer
from moe_ray.storage.damage import reading

_TENSORS, _STATE = "training.safetensors", "training.json"
_CURE = "remove the run's `finetune` folder to start the training anew"
_STATE_NAMES = ("weight", "step", "exp_avg", "exp_avg_sq")
"""What is kept of each parameter: its value and what AdamW has of it."""
_NONE = TensorInfo("", (-1,))
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
    """How many steps a finished checkpoint has behind it.

    Raises:
        InputError: there is none, or it is damaged.
    """
    return int(_read_state(folder)["next_step"])


def load_checkpoint(trainer: MaskedTrainer, folder: str | Path) -> None:
    """Puts a saved state into a trainer built from the same run; one that is refused changes nothing.

    Raises:
        InputError: there is no finished checkpoint, it is damaged, or it was made with other masks or another order of
            batches.
    """
    state = _read_state(folder)
    if state["masks"] != trainer.masks.digest():
        raise InputError(
            "the training checkpoint belongs to other masks; remove the run's `finetune` folder to start anew"
        )
    if state["plan"] != hash_plan(trainer.plan):
        raise InputError(
            "the training checkpoint belongs to another order of batches: finetune.epochs, finetune.num_workers, "
            "finetune.length_window or seed differ; set them back, or remove the run's `finetune` folder to start anew"
        )
    path, trained = Path(folder, _TENSORS), _trained(trainer)
    _check_layout(path, trained)
    # Not on one of the model's devices: layers may be spread over several, none of which has room for all of it.
    tensors = read_tensors(path, cure=_CURE)
    if (name := first_not_finite(tensors.items())) is not None:
        raise InputError(f"{path}: {name} has infinite or undefined numbers; {_CURE}")
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


def _read_state(folder: str | Path) -> dict[str, Any]:
    path = Path(folder, _STATE)
    if not path.is_file():
        raise InputError(f"{str(folder)!r} holds no training checkpoint (no {_STATE}); start the training anew")
    with reading(str(path), expected="the state of a training", cure=_CURE):
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        losses = state["validation_losses"]
        if type(state["next_step"]) is not int or state["next_step"] < 0 or not isinstance(losses, list):
            raise TypeError("next_step or validation_losses are of another type")
        if not all(type(state[name]) is str for name in ("masks", "plan")):
            raise TypeError("masks or plan are no hashes")
        if not all(type(loss) is float for loss in losses):
            raise TypeError("validation_losses are no numbers")
    return state


def _check_layout(path: Path, trained: Sequence[tuple[nn.Parameter, torch.optim.Optimizer]]) -> None:
    """Refuses a file whose tensors are not those of what is trained, by its header.

    Raises:
        InputError: they are not.
    """
    infos = tensor_infos(path, cure=_CURE)
    names = {dtype: name for name, dtype in DTYPES.items()}
    wanted = {
        f"{index}.weight": TensorInfo(names[parameter.dtype], tuple(parameter.shape))
        for index, (parameter, _) in enumerate(trained)
    }
    for key, info in wanted.items():
        if infos.get(key) != info:
            raise InputError(f"{path}: expected {key} as {info}, got {infos.get(key)}; {_CURE}")
    for key, info in infos.items():
        index, _, name = key.partition(".")
        shapes = ((),) if name == "step" else (wanted.get(f"{index}.weight", _NONE).shape,)
        if info.shape not in shapes or name not in _STATE_NAMES:
            raise InputError(f"{path}: got {key[:80]} as {info}, which no part of the training has; {_CURE}")


def _trained(trainer: MaskedTrainer) -> list[tuple[nn.Parameter, torch.optim.Optimizer]]:
    """Every parameter with its optimiser: the experts', then the routers' where they train."""
    trained: list[tuple[nn.Parameter, torch.optim.Optimizer]] = [
        (parameter, trainer.optimizer) for parameter in trainer.trainable.all_parameters()
    ]
    if trainer.routers is not None:
        trained += [(parameter, trainer.routers.optimizer) for parameter in trainer.routers.all_parameters()]
    return trained

"""Training checkpoints: what was trained, optimiser state and the next step, as safetensors and JSON, never a pickle.

A worker writes the experts that it owns, so none gathers the state of all: with several there is a file of each, and they
are one checkpoint once they lie in one folder. Any number of workers goes on from it: each reads all weights, and the state
of what is its own now.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from moe_ray.errors import InputError
from moe_ray.finetuning.schedule import hash_plan
from moe_ray.finetuning.tensor_files import (
    DTYPES,
    TensorInfo,
    file_metadata,
    first_not_finite,
    read_tensors,
    tensor_infos,
)
from moe_ray.finetuning.trainer import MaskedTrainer
from moe_ray.storage.damage import reading

_TENSORS, _STATE = "training.safetensors", "training.json"
_CURE = "remove the run's `finetune` folder to start the training anew"
_STATE_NAMES = ("weight", "step", "exp_avg", "exp_avg_sq")
"""What is kept of each parameter: its value and what AdamW has of it."""
_NONE = TensorInfo("", (-1,))
CHECKPOINT_FILES = (_TENSORS, _STATE)
"""The files of a checkpoint of one worker, in the order in which they are written."""


class _Trained(NamedTuple):
    """A parameter that is trained.

    Attributes:
        parameter: itself.
        optimizer: of its steps.
        keeps_state: this worker makes its steps.
        writes: this worker writes it.
    """

    parameter: nn.Parameter
    optimizer: torch.optim.Optimizer
    keeps_state: bool
    writes: bool


def save_checkpoint(trainer: MaskedTrainer, folder: str | Path) -> None:
    """Writes this worker's part of the training's state into an existing folder, rank 0 the JSON part too, and last.

    Every worker has to call it after the same step. Their files belong in one folder, which may be the one that they all
    write into; the checkpoint is whole when all are there.
    """
    tensors: dict[str, Tensor] = {}
    for index, trained in enumerate(_trained(trainer)):
        if trained.writes:
            tensors[f"{index}.weight"] = trained.parameter.detach()
            for name, value in trained.optimizer.state.get(trained.parameter, {}).items():
                tensors[f"{index}.{name}"] = torch.as_tensor(value)
    # A folder that held an older state is unfinished until the new JSON is there.
    if trainer.rank == 0:
        Path(folder, _STATE).unlink(missing_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        Path(folder, _part_name(trainer.rank, trainer.world_size)),
        metadata={"next_step": str(trainer.next_step)},
    )
    if trainer.rank != 0:
        return
    state = {
        "next_step": trainer.next_step,
        "validation_losses": trainer.validation_losses,
        "masks": trainer.masks.digest(),
        "plan": hash_plan(trainer.plan),
        "num_parts": trainer.world_size,
    }
    Path(folder, _STATE).write_text(json.dumps(state), encoding="utf-8")


def _part_name(number: int, num_parts: int) -> str:
    return _TENSORS if num_parts == 1 else f"training-{number:05d}-of-{num_parts:05d}.safetensors"


def steps_done(folder: str | Path) -> int:
    """How many steps a finished checkpoint has behind it.

    Raises:
        InputError: there is none, a part of it is missing, or it is damaged.
    """
    state = _read_state(folder)
    for path in _parts(folder, state):
        if not path.is_file():
            raise InputError(f"{path} is missing, one of {state['num_parts']} parts of a training checkpoint; {_CURE}")
    return int(state["next_step"])


def load_checkpoint(trainer: MaskedTrainer, folder: str | Path) -> None:
    """Puts a saved state into a trainer built from the same run, of any number of workers; a refused one changes nothing.

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
    steps_done(folder)
    trained = _trained(trainer)
    tensors: dict[str, Tensor] = {}
    for path, names in _check_layout(list(_parts(folder, state)), state["next_step"], trained).items():
        # Not on one of the model's devices: layers may be spread over several, none of which has room for all of it.
        part = read_tensors(path, cure=_CURE, only=[name for name in names if _is_needed(name, trained)])
        if (name := first_not_finite(part.items())) is not None:
            raise InputError(f"{path}: {name} has infinite or undefined numbers; {_CURE}")
        tensors |= part
    with torch.no_grad():
        for index, (parameter, optimizer, _, _) in enumerate(trained):
            parameter.copy_(tensors.pop(f"{index}.weight"))
            optimizer.state.pop(parameter, None)
    for key, tensor in tensors.items():
        index_text, _, name = key.partition(".")
        parameter, optimizer, _, _ = trained[int(index_text)]
        # The step counter of the plain AdamW is on the CPU, that of the fused kernel beside the parameter. Layers may be on
        # several devices.
        on_cpu = name == "step" and not optimizer.defaults["fused"]
        optimizer.state[parameter][name] = tensor.to("cpu" if on_cpu else parameter.device)
    trainer.trainable.write_back(trainer.trainable.union_LE)
    if trainer.routers is not None:
        trainer.routers.write_back()
    trainer.next_step = state["next_step"]
    trainer.validation_losses = state["validation_losses"]


def _parts(folder: str | Path, state: dict[str, Any]) -> Iterator[Path]:
    return (Path(folder, _part_name(number, state["num_parts"])) for number in range(state["num_parts"]))


def _is_needed(key: str, trained: Sequence[_Trained]) -> bool:
    """Whether this worker reads a tensor: every weight, and the optimiser state of what it makes the steps of."""
    index, _, name = key.partition(".")
    return name == "weight" or trained[int(index)].keeps_state


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
        # Checkpoints of an earlier version have one part and do not say so.
        if type(state.setdefault("num_parts", 1)) is not int or state["num_parts"] < 1:
            raise TypeError("num_parts is no number of files")
    return state


def _check_layout(paths: Sequence[Path], next_step: int, trained: Sequence[_Trained]) -> dict[Path, list[str]]:
    """The tensors of each file, which together are those of what is trained, by their headers.

    Raises:
        InputError: they are not, or a file is of another step.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    wanted = {
        f"{index}.weight": TensorInfo(names[one.parameter.dtype], tuple(one.parameter.shape))
        for index, one in enumerate(trained)
    }
    infos = {path: tensor_infos(path, cure=_CURE) for path in paths}
    found = {key: info for of_part in infos.values() for key, info in of_part.items()}
    for key, info in wanted.items():
        if found.get(key) != info:
            raise InputError(f"{paths[0]}: expected {key} as {info}, got {found.get(key)}; {_CURE}")
    for path, of_part in infos.items():
        for key, info in of_part.items():
            index, _, name = key.partition(".")
            shapes = ((),) if name == "step" else (wanted.get(f"{index}.weight", _NONE).shape,)
            if info.shape not in shapes or name not in _STATE_NAMES or f"{index}.weight" not in of_part:
                raise InputError(f"{path}: got {key[:80]} as {info}, which no part of the training has; {_CURE}")
        step = file_metadata(path, cure=_CURE).get("next_step", str(next_step))
        if step != str(next_step):
            raise InputError(f"{path}: got the state before step {step[:20]}, expected that of {next_step}; {_CURE}")
    return {path: list(of_part) for path, of_part in infos.items()}


def _trained(trainer: MaskedTrainer) -> list[_Trained]:
    """Every parameter with its optimiser: the experts', then the routers' where they train, whose steps all workers make."""
    trained = [
        _Trained(parameter, trainer.optimizer, is_own, is_own)
        for expert, parameters in trainer.trainable.parameters.items()
        for is_own in (bool(trainer.owners.own([expert])),)
        for parameter in parameters.values()
    ]
    if trainer.routers is not None:
        trained += [
            _Trained(parameter, trainer.routers.optimizer, True, trainer.rank == 0)
            for parameter in trainer.routers.all_parameters()
        ]
    return trained

"""Which type, which devices and how many processes a run uses: a function of the settings, the model and the machines.

What a setting says is done; only `auto` is decided here. With GPUs every process gets as many as the weights need, and as
many processes as have room are used. Without them a process on each node computes with all of its cores, so a second one
would only take memory. The type is one for the whole run, since counts, hashes and learned experts depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from moe_ray.config.auto import Auto, gpus_of, processes_of
from moe_ray.config.run import Config
from moe_ray.errors import InputError
from moe_ray.resources.fitting import RESERVED, ROOM, copies, gpus_per_copy, places_on_cpus
from moe_ray.resources.model_size import ModelSize
from moe_ray.resources.nodes import GB, Node, gpus_here

_LINEAR_LAYERS_ONLY = ("bitsandbytes", "torchao")
"""Quantisations of transformers that do not reach fused experts."""

_ROOM_TO_TRAIN = 1.25
"""Weights with what a training of some experts takes beside them, see `docs/scale.md`."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What was decided.

    Attributes:
        config: the settings, with a number in the place of every `auto`, and the type.
        dtype: that every process loads the weights in.
        process_bytes: of weights and buffers, in each process that holds the model, or its part of it.
        gpus_per_copy: that the weights need in all; 0 = the model is on the CPU.
        in_words: one line for people.
        warnings: a sentence each.
    """

    config: Config
    dtype: str
    process_bytes: int
    gpus_per_copy: int
    in_words: str
    warnings: tuple[str, ...] = ()


def decide(
    config: Config, model: ModelSize, nodes: Sequence[Node], *, dtype: str | None = None, may_grow: bool = False
) -> Decision:
    """Puts a number in the place of every `auto`.

    Args:
        config: the settings.
        model: which one.
        nodes: the machines.
        dtype: what `auto` was when the run directory was begun; None = it is new.
        may_grow: the cluster may add nodes that are not among `nodes`, so what does not fit now may fit later.

    Raises:
        InputError: the weights fit no machine, in the type and on the devices that the settings ask for.
    """
    shards = config.model.num_shards
    per_copy = gpus_per_copy(model, nodes, shards)
    asked = _gpus_asked(config)
    if not per_copy:
        # On nodes that may come yet, where the settings say how many for some of the processes.
        per_copy = math.ceil(max((gpus for gpus in asked.values() if not isinstance(gpus, str)), default=0))
    on_gpu = bool(per_copy) and any(gpus == "auto" or gpus for gpus in asked.values())
    on_cpu = not per_copy or any(gpus == 0 for gpus in asked.values())
    chosen, why = _dtype(config, model, nodes, on_gpu=on_gpu, recorded=dtype)
    needed = math.ceil(model.bytes_in(chosen) * ROOM / shards)
    if on_cpu and not may_grow and nodes:
        _require_room(model, chosen, needed, nodes, shards)
    resolved = _with_numbers(config, per_copy, nodes, needed)
    return Decision(
        config=replace(resolved, model=replace(resolved.model, dtype=chosen)),  # type: ignore[arg-type]
        dtype=chosen,
        process_bytes=needed,
        gpus_per_copy=per_copy,
        in_words=f"{_weights_in_words(model, chosen)}{why}: {_processes_in_words(resolved, nodes)}",
        warnings=tuple(_warnings(resolved, model, nodes, per_copy, may_grow=may_grow)),
    )


def local_cpus(config: Config, *, gpus: int | None = None) -> int:
    """Logical CPUs of a Ray that is started on this machine.

    Args:
        config: the settings.
        gpus: of this machine; None = it is asked.
    """
    if config.cluster.num_cpus != "auto":
        return config.cluster.num_cpus
    sections = (config.capture, config.evaluate, config.ablate)
    numbers = [*(processes_of(section.num_actors) for section in sections), config.capture.max_actors]
    asked = [number * config.model.num_shards for number in numbers]
    asked += [config.finetune.num_workers, config.compare.max_concurrent]
    asked.append(math.ceil(config.sweep.max_concurrent_trials * config.sweep.cpus_per_trial))
    return max(4, max(asked) + 2, (gpus_here()[0] if gpus is None else gpus) + 2)


def _gpus_asked(config: Config) -> dict[str, float | Auto]:
    return {
        "capture": config.capture.gpus_per_actor,
        "causal check": config.ablate.gpus_per_actor,
        "training": config.finetune.gpus_per_worker,
        "answers": config.evaluate.gpus_per_actor,
    }


def _dtype(
    config: Config, model: ModelSize, nodes: Sequence[Node], *, on_gpu: bool, recorded: str | None
) -> tuple[str, str]:
    """The type, and why where that is not plain."""
    if config.model.dtype != "auto":
        return config.model.dtype, ""
    if recorded is not None:
        return recorded, "" if recorded == model.own_dtype or not on_gpu else ", as this run directory was begun"
    if on_gpu or model.own_dtype == "float32":
        return model.own_dtype, ""
    wide = model.bytes_in("float32")
    most = max((node.memory for node in nodes if node.cpus), default=0)
    if places_on_cpus(nodes, wide * _ROOM_TO_TRAIN / config.model.num_shards, config.model.num_shards):
        return "float32", ""
    return model.own_dtype, f" ({wide / GB:.1f} GB in float32 have no room in {most / GB:.1f} GB)"


def _require_room(model: ModelSize, dtype: str, needed: int, nodes: Sequence[Node], shards: int) -> None:
    most = max((node.memory for node in nodes if node.cpus), default=0)
    if shards > 1 and not places_on_cpus(nodes, needed, shards):
        raise InputError(
            f"{_weights_in_words(model, dtype)}: got {len(nodes)} nodes of at most {most / GB:.1f} GB of memory, expected "
            f"room for {shards} processes (model.num_shards) of {needed / GB:.1f} GB each beside {RESERVED / GB:.0f} GB for "
            "libraries on a node; use more nodes or larger ones, or GPUs"
        )
    if shards == 1 and needed + RESERVED > most:
        raise InputError(
            f"{_weights_in_words(model, dtype)}: got at most {most / GB:.1f} GB of memory on a node, expected "
            f"{(needed + RESERVED) / GB:.1f} GB for the weights and the libraries beside them; set "
            f"{'model.dtype=bfloat16, ' if dtype == 'float32' else ''}use a machine with more memory, or GPUs"
        )


def _with_numbers(config: Config, per_copy: int, nodes: Sequence[Node], needed: int) -> Config:
    shards = config.model.num_shards
    whole = float(per_copy if shards == 1 else min(1, per_copy))

    def gpus(asked: float | Auto) -> float:
        return whole if asked == "auto" else float(asked)

    def processes(asked: int | Auto, of_each: float, least: int = 1) -> int:
        return copies(nodes, of_each, needed, shards) if asked == "auto" else max(least, asked)

    capture, evaluate, ablate = config.capture, config.evaluate, config.ablate
    for_capture, for_answers, for_check = map(
        gpus, (capture.gpus_per_actor, evaluate.gpus_per_actor, ablate.gpus_per_actor)
    )
    for_worker = gpus(config.finetune.gpus_per_worker)
    if config.finetune.shard != "none":
        for_worker = min(1.0, for_worker)  # a worker's part of a sharded model is on one GPU
    num_capture = processes(capture.num_actors, for_capture)
    if capture.max_actors and capture.num_actors == "auto":
        num_capture = min(num_capture, capture.max_actors)
    return replace(
        config,
        capture=replace(capture, gpus_per_actor=for_capture, num_actors=num_capture),
        evaluate=replace(evaluate, gpus_per_actor=for_answers, num_actors=processes(evaluate.num_actors, for_answers)),
        ablate=replace(ablate, gpus_per_actor=for_check, num_actors=processes(ablate.num_actors, for_check)),
        finetune=replace(
            config.finetune,
            # A worker in the process of the command has no GPU of Ray's.
            gpus_per_worker=for_worker if config.finetune.num_workers else 0.0,
        ),
        sweep=replace(config.sweep, gpus_per_trial=gpus(config.sweep.gpus_per_trial)),
    )


def _weights_in_words(model: ModelSize, dtype: str) -> str:
    codes = "" if model.quantisation == "none" else f" with experts in {model.quantisation}"
    return f"{model.name}, {model.bytes_in(dtype) / GB:.1f} GB in {dtype}{codes}"


def _processes_in_words(config: Config, nodes: Sequence[Node]) -> str:
    names = {node.gpu_name for node in nodes if node.gpus} - {""}
    kind = names.pop() if len(names) == 1 else "GPU"

    def device(gpus: float) -> str:
        return f"{gpus:g} {kind}" if gpus else "CPU"

    shards = config.model.num_shards
    stages = {
        "capture": (processes_of(config.capture.num_actors), gpus_of(config.capture.gpus_per_actor)),
        "answers": (processes_of(config.evaluate.num_actors), gpus_of(config.evaluate.gpus_per_actor)),
        "training": (max(1, config.finetune.num_workers), gpus_of(config.finetune.gpus_per_worker)),
    }
    if shards == 1 and len(set(stages.values())) == 1:
        count, gpus = stages["capture"]
        return f"{count} {'process' if count == 1 else 'processes'} x {device(gpus)}"
    of_copy = dict.fromkeys(("capture", "answers"), "" if shards == 1 else f"{shards} shards x ")
    return ", ".join(
        f"{name} {count} x {of_copy.get(name, '')}{device(gpus)}" for name, (count, gpus) in stages.items()
    )


def _warnings(config: Config, model: ModelSize, nodes: Sequence[Node], per_copy: int, *, may_grow: bool) -> list[str]:
    found = _warnings_of_gpus(config, model, nodes, per_copy, may_grow=may_grow)
    if model.stored_as in _LINEAR_LAYERS_ONLY and model.experts:
        share = model.experts * model.expert_parameters / model.parameters
        found.append(
            f"the checkpoint is quantised as {model.stored_as}, which leaves fused experts as they are: {share:.0%} of its "
            "numbers; model.quantisation quantises them, of the checkpoint before its quantisation"
        )
    return found


def _warnings_of_gpus(
    config: Config, model: ModelSize, nodes: Sequence[Node], per_copy: int, *, may_grow: bool
) -> list[str]:
    there = sum(node.gpus for node in nodes)
    if not there:
        if per_copy or not may_grow:
            return []
        return [
            "no node of the cluster has a GPU now, so the model is on the CPU; where nodes with GPUs are added when they "
            "are asked for, ask with capture.gpus_per_actor=1"
        ]
    if not per_copy:
        most = max(node.gpus * (node.gpu_memory or 0) for node in nodes)
        if config.model.num_shards > 1:
            return [
                f"the weights of {model.name} have no room on {config.model.num_shards} GPUs (model.num_shards), or so many "
                "are not there, so the model is on the CPU, which is slow; raise model.num_shards, or use more GPUs"
            ]
        return [
            f"the weights of {model.name} have no room on the GPUs of one node ({most / GB:.0f} GB), so the model is on "
            "the CPU, which is slow; use nodes with more GPUs"
        ]
    idle = [name for name, gpus in _gpus_asked(config).items() if gpus == 0]
    if idle:
        return [f"{there} GPUs are there, and {', '.join(idle)} use none, as the settings say"]
    return []

"""Learned experts as a small adapter: saved, applied to a base model, reverted, merged into a plain checkpoint.

An adapter is `experts.safetensors`, holding only the union's weights, and its header `adapter.json`, which says what they
belong to: base model, layout, experts, mask hash, and a hash of the base's own weights of these experts, so that an
adapter for another base is refused. `adapter_files` handles the two files where torch is not needed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_ray.errors import InputError
from moe_ray.experts import Expert
from moe_ray.finetuning.adapter_files import ADAPTER_FORMAT, HEADER, TENSORS, read_adapter_header
from moe_ray.finetuning.trainable_experts import TrainableExperts
from moe_ray.models.moe_layers import find_moe_layers

ExpertTensors = Mapping[Expert, Mapping[str, Tensor]]


def expert_weights(model: nn.Module, experts: list[Expert]) -> dict[Expert, dict[str, Tensor]]:
    """Copies of the model's own weights of the given experts, by tensor name."""
    layers = {layer.layer: layer for layer in find_moe_layers(model)}
    return {
        expert: {
            name: tensor.detach().clone() for name, tensor in layers[expert.layer].tensors_of(expert.expert).items()
        }
        for expert in experts
    }


def hash_weights(tensors: ExpertTensors) -> str:
    """A hash of experts, names, types and bytes."""
    digest = hashlib.sha256()
    for expert in sorted(tensors):
        for name, tensor in sorted(tensors[expert].items()):
            digest.update(f"{expert} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()[:16]


def save_adapter(folder: str | Path, trainable: TrainableExperts, *, base: str, base_hash: str, mask_hash: str) -> None:
    """Writes the trained experts; `adapter.json` last, so a folder without it is unfinished.

    Args:
        folder: made if missing.
        trainable: the trained union.
        base: name or path of the base model, for people.
        base_hash: `hash_weights` of the base's own weights of these experts, before training.
        mask_hash: `ExpertMasks.digest()`.
    """
    header = {
        "format": ADAPTER_FORMAT,
        "base": base,
        "base_hash": base_hash,
        "mask_hash": mask_hash,
        "model_type": _model_type(trainable.model),
        "layers": list(trainable.moe_layers.layers),
        "num_experts": trainable.moe_layers.num_experts,
    }
    _write(folder, header, trainable.parameters)


def compose_adapters(
    folders: Sequence[str | Path], out: str | Path, *, base_weights: ExpertTensors, mask_hash: str
) -> None:
    """Writes one adapter of the first folder's base that does what the given ones do one after another.

    Each was trained on the model that the adapters before it gave. If several adapters hold an expert, the last
    one's weights win.

    Args:
        folders: adapters, in the order in which they were trained.
        out: made if missing.
        base_weights: the base model's own weights of all their experts, before any of them.
        mask_hash: of the masks of all of them.

    Raises:
        InputError: they are adapters of other layouts, or `base_weights` lacks one of their experts.
    """
    tensors: dict[Expert, Mapping[str, Tensor]] = {}
    headers = []
    for folder in folders:
        header, learned = load_adapter(folder)
        tensors |= learned
        headers.append(header)
    layouts = {(header["model_type"], tuple(header["layers"]), header["num_experts"]) for header in headers}
    if len(layouts) != 1 or base_weights.keys() != tensors.keys():
        raise InputError(
            f"adapters {[str(folder) for folder in folders]} do not compose: got layouts {sorted(layouts)} and base "
            f"weights of {len(base_weights)} experts, expected one layout and {len(tensors)} experts; give the rounds of "
            "one run"
        )
    header = headers[0] | {"base_hash": hash_weights(base_weights), "mask_hash": mask_hash}
    _write(out, header, {expert: tensors[expert] for expert in sorted(tensors)})


def _write(folder: str | Path, header: Mapping[str, Any], tensors: ExpertTensors) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    # A folder that held an older adapter is unfinished until the new header is there.
    Path(folder, HEADER).unlink(missing_ok=True)
    flat = {
        f"{expert.layer}.{expert.expert}.{name}": tensor.detach().contiguous()
        for expert, by_name in tensors.items()
        for name, tensor in by_name.items()
    }
    save_file(flat, Path(folder, TENSORS))
    listed = {**header, "experts": [list(expert) for expert in tensors]}
    Path(folder, HEADER).write_text(json.dumps(listed, indent=1), encoding="utf-8")


def load_adapter(folder: str | Path) -> tuple[dict[str, Any], dict[Expert, dict[str, Tensor]]]:
    """An adapter's header and tensors.

    Raises:
        InputError: the folder holds no finished adapter.
    """
    header = read_adapter_header(folder)
    tensors: dict[Expert, dict[str, Tensor]] = {Expert(*pair): {} for pair in header["experts"]}
    for key, tensor in load_file(Path(folder, TENSORS)).items():
        layer, expert, name = key.split(".", 2)
        tensors[Expert(int(layer), int(expert))][name] = tensor
    return header, tensors


def apply_adapter(model: nn.Module, folder: str | Path) -> None:
    """Puts an adapter's experts into its base model.

    Raises:
        InputError: the model has other layers, experts or shapes than the adapter, or other base weights.
    """
    header, tensors = load_adapter(folder)
    _check_fits(model, header, tensors)
    _install(model, tensors)


@contextmanager
def adapter_applied(model: nn.Module, folder: str | Path) -> Iterator[None]:
    """The adapter is in force inside the context; the base's own weights are back, bit for bit, after it."""
    header, tensors = load_adapter(folder)
    _check_fits(model, header, tensors)
    with experts_restored(model, list(tensors)):
        _install(model, tensors)
        yield


@contextmanager
def experts_restored(model: nn.Module, experts: Sequence[Expert]) -> Iterator[None]:
    """Whatever happens to the given experts inside the context, their weights are back, bit for bit, after it."""
    original = expert_weights(model, list(experts))
    try:
        yield
    finally:
        _install(model, original)


def merge_adapter(
    model: PreTrainedModel, folder: str | Path, out: str | Path, *, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Writes base model + adapter as a plain checkpoint, with the per-expert names of the family's hub checkpoints.

    The model given keeps its own weights.
    """
    with adapter_applied(model, folder):
        model.save_pretrained(out)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)


def _check_fits(model: nn.Module, header: Mapping[str, Any], tensors: ExpertTensors) -> None:
    moe_layers = find_moe_layers(model)
    got = (_model_type(model), list(moe_layers.layers), moe_layers.num_experts)
    expected = (header["model_type"], header["layers"], header["num_experts"])
    if got != expected:
        raise InputError(
            f"adapter for {header['base']!r}: got a model with (type, layers, experts) {got}, expected {expected}; "
            "load the base checkpoint it names"
        )
    original = expert_weights(model, list(tensors))
    for expert, by_name in original.items():
        shapes = {name: tuple(tensor.shape) for name, tensor in by_name.items()}
        wanted = {name: tuple(tensor.shape) for name, tensor in tensors[expert].items()}
        if shapes != wanted:
            raise InputError(
                f"adapter for {header['base']!r}: {expert} has shapes {shapes} in the model, expected {wanted}"
            )
    if hash_weights(original) != header["base_hash"]:
        raise InputError(
            f"adapter for {header['base']!r}: the model's own weights of these experts are not those it was trained from; "
            "load the base checkpoint it names, in the type it was trained in"
        )


def _model_type(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", ""))


@torch.no_grad()
def _install(model: nn.Module, tensors: ExpertTensors) -> None:
    layers = {layer.layer: layer for layer in find_moe_layers(model)}
    for expert, by_name in tensors.items():
        for name, tensor in layers[expert.layer].tensors_of(expert.expert).items():
            tensor.copy_(by_name[name])

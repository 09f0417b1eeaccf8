"""Learned experts as a small adapter: saved, applied to a base model, reverted, merged into a plain checkpoint.

An adapter is `experts.safetensors`, holding only the union's weights and, where routers were trained too, those of all
routers, and its header `adapter.json`, which says what they belong to: base model, layout, experts, routers, mask hash, and
a hash of the base's own weights of all of these, so that an adapter for another base is refused.
`adapter_files` handles the two files where torch is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_ray.errors import InputError
from moe_ray.experts import Expert, Router
from moe_ray.finetuning.adapter_files import (
    ADAPTER_FORMAT,
    ADAPTER_FORMAT_WITHOUT_ROUTERS,
    HEADER,
    TENSORS,
    read_adapter_header,
)
from moe_ray.finetuning.adapter_tensors import (
    ExpertTensors,
    Part,
    about_weights,
    adapter_layout,
    hash_weights,
    read_weights,
    tensor_key,
)
from moe_ray.finetuning.tensor_files import TensorInfo
from moe_ray.finetuning.trainable_experts import TrainableExperts
from moe_ray.models.expert_codes import codes_of
from moe_ray.models.expert_storage import storage_of
from moe_ray.models.moe_layers import MoELayer, find_moe_layers


def own_tensors(layer: MoELayer, part: Part) -> Mapping[str, Tensor]:
    """The model's own weights of an expert or a router of the layer, by name; to be read only."""
    return layer.router_tensors() if isinstance(part, Router) else storage_of(layer).read(part.expert)


def _own_dtypes(layer: MoELayer, part: Part) -> dict[str, torch.dtype]:
    """The types of what `own_tensors` gives, which no other process has to help with."""
    if isinstance(part, Router):
        return {name: tensor.dtype for name, tensor in layer.router_tensors().items()}
    return storage_of(layer).dtypes()


def expert_weights(model: nn.Module, parts: Iterable[Part]) -> dict[Part, dict[str, Tensor]]:
    """Copies of the model's own weights of the given experts and routers, by tensor name."""
    layers = {layer.layer: layer for layer in find_moe_layers(model)}
    return {
        part: {name: tensor.detach().clone() for name, tensor in own_tensors(layers[part.layer], part).items()}
        for part in parts
    }


def save_adapter(
    folder: str | Path,
    trainable: TrainableExperts,
    *,
    base: str,
    base_hash: str,
    mask_hash: str,
    routers: ExpertTensors | None = None,
) -> None:
    """Writes the trained experts and routers; `adapter.json` last, so a folder without it is unfinished.

    Args:
        folder: made if missing.
        trainable: the trained union.
        base: name or path of the base model, for people.
        base_hash: `hash_weights` of the base's own weights of these experts and routers, before training.
        mask_hash: `ExpertMasks.digest()`.
        routers: the trained routers; None = they were frozen.
    """
    header = {
        "base": base,
        "base_hash": base_hash,
        "mask_hash": mask_hash,
        "dtype": str(_own_dtype(trainable)).removeprefix("torch."),
        "model_type": _model_type(trainable.model),
        "layers": list(trainable.moe_layers.layers),
        "num_experts": trainable.moe_layers.num_experts,
        **_about_codes(trainable.model),
    }
    parts: dict[Part, Mapping[str, Tensor]] = dict(routers or {})
    for expert, tensors in trainable.parameters.items():
        parts[expert] = tensors
    # In the model's own type, which holds all that the model computed with: what is learned in float32 is rounded to it.
    layers = {layer.layer: layer for layer in trainable.moe_layers}
    own: dict[Part, Mapping[str, Tensor]] = {}
    for part, by_name in parts.items():
        types = _own_dtypes(layers[part.layer], part)
        own[part] = {name: tensor.detach().to(types[name]) for name, tensor in by_name.items()}
    _write(folder, header, own)


def _about_codes(model: nn.Module) -> dict[str, str]:
    # Adapters of plain models say nothing, as those of earlier versions.
    methods = {codes.method for layer in find_moe_layers(model) for codes in codes_of(layer.experts).values()}
    return {"quantisation": methods.pop()} if methods else {}


def _own_dtype(trainable: TrainableExperts) -> torch.dtype:
    """The type of the model's experts, which a run decides once for all of its processes."""
    return next(iter(storage_of(trainable.moe_layers[0]).dtypes().values()))


def compose_adapters(
    folders: Sequence[str | Path], out: str | Path, *, base_weights: ExpertTensors, mask_hash: str
) -> None:
    """Writes one adapter of the first folder's base that does what the given ones do one after another.

    Each was trained on the model that the adapters before it gave. If several adapters hold an expert, the last
    one's weights win.

    Args:
        folders: adapters, in the order in which they were trained.
        out: made if missing.
        base_weights: the base model's own weights of all their experts and routers, before any of them.
        mask_hash: of the masks of all of them.

    Raises:
        InputError: they are adapters of other layouts, or `base_weights` lacks one of their experts.
    """
    tensors: dict[Part, Mapping[str, Tensor]] = {}
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
    _write(out, header, {part: tensors[part] for part in sorted(tensors)})


def _write(folder: str | Path, header: Mapping[str, Any], tensors: ExpertTensors) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    # A folder that held an older adapter is unfinished until the new header is there.
    Path(folder, HEADER).unlink(missing_ok=True)
    flat = {
        tensor_key(part, name): tensor.detach().contiguous()
        for part, by_name in tensors.items()
        for name, tensor in by_name.items()
    }
    save_file(flat, Path(folder, TENSORS))
    routers = [part.layer for part in tensors if isinstance(part, Router)]
    listed = {
        **header,
        # Without routers, the files are those that earlier versions wrote and read.
        "format": ADAPTER_FORMAT if routers else ADAPTER_FORMAT_WITHOUT_ROUTERS,
        "experts": [list(part) for part in tensors if isinstance(part, Expert)],
        **({"routers": routers} if routers else {}),
        **about_weights(tensors),
    }
    Path(folder, HEADER).write_text(json.dumps(listed, indent=1), encoding="utf-8")


def load_adapter(
    folder: str | Path, model: nn.Module | None = None
) -> tuple[dict[str, Any], dict[Part, dict[str, Tensor]]]:
    """An adapter's header and tensors.

    Args:
        folder: of the adapter.
        model: where it is given, an adapter of another base model is refused, by its layout before its weights are read.

    Raises:
        InputError: the folder holds no finished adapter, it is damaged, or it is not the model's.
    """
    header = read_adapter_header(folder)
    layout = adapter_layout(Path(folder), header)
    if model is not None:
        _check_fits(model, header, layout)
    return header, read_weights(Path(folder), header)


def apply_adapter(model: nn.Module, folder: str | Path) -> None:
    """Puts an adapter's experts and routers into its base model.

    Raises:
        InputError: the model has other layers, experts or shapes than the adapter, or other base weights.
    """
    put_weights(model, load_adapter(folder, model)[1])


@contextmanager
def adapter_applied(model: nn.Module, folder: str | Path) -> Iterator[None]:
    """The adapter is in force inside the context; the base's own weights are back, bit for bit, after it."""
    _, tensors = load_adapter(folder, model)
    with experts_restored(model, list(tensors)):
        put_weights(model, tensors)
        yield


@contextmanager
def experts_restored(model: nn.Module, parts: Iterable[Part]) -> Iterator[None]:
    """Whatever happens to these experts and routers inside the context, their weights are back, bit for bit, after it."""
    layers = {layer.layer: layer for layer in find_moe_layers(model)}
    parts = list(parts)
    restorations = [
        storage_of(layers[part.layer]).restoration(part.expert) for part in parts if isinstance(part, Expert)
    ]
    routers = expert_weights(model, [part for part in parts if isinstance(part, Router)])
    try:
        yield
    finally:
        for restore in restorations:
            restore()
        put_weights(model, routers)


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


def check_kind(model: nn.Module, header: Mapping[str, Any]) -> None:
    """Refuses a model of another kind than an adapter's; it may be on the meta device.

    Raises:
        InputError: the model is of another type, or has other layers or another number of experts.
    """
    moe_layers = find_moe_layers(model)
    got = (_model_type(model), list(moe_layers.layers), moe_layers.num_experts)
    expected = (header["model_type"], header["layers"], header["num_experts"])
    if got != expected:
        raise InputError(
            f"adapter for {header['base']!r}: got a model with (type, layers, experts) {got}, expected {expected}; "
            "load the base checkpoint it names"
        )


def _check_fits(model: nn.Module, header: Mapping[str, Any], layout: Mapping[Part, Mapping[str, TensorInfo]]) -> None:
    check_kind(model, header)
    layers = {layer.layer: layer for layer in find_moe_layers(model)}
    original = {part: own_tensors(layers[part.layer], part) for part in layout}
    for part, by_name in original.items():
        shapes = {name: tuple(tensor.shape) for name, tensor in by_name.items()}
        wanted = {name: info.shape for name, info in layout[part].items()}
        if shapes != wanted:
            raise InputError(
                f"adapter for {header['base']!r}: {part} has shapes {shapes} in the model, expected {wanted}"
            )
    stated, own = header.get("quantisation", "none"), _about_codes(model).get("quantisation", "none")
    if stated != own:
        raise InputError(
            f"adapter for {header['base']!r}: it was learned over experts quantised as {stated}, got a model with "
            f"{own}; load the base with model.quantisation={stated}"
        )
    if hash_weights(original) != header["base_hash"]:
        raise InputError(
            f"adapter for {header['base']!r}: the model's own weights of these experts are not those it was trained from; "
            f"load the base checkpoint it names, in {header.get('dtype', 'the type it was trained in')}"
        )


def _model_type(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", ""))


@torch.no_grad()
def put_weights(model: nn.Module, tensors: ExpertTensors) -> None:
    """Copies weights of experts and routers into the model's own."""
    layers = {layer.layer: layer for layer in find_moe_layers(model)}
    for part, by_name in tensors.items():
        if isinstance(part, Expert):
            storage_of(layers[part.layer]).write(part.expert, by_name)
            continue
        for name, tensor in layers[part.layer].router_tensors().items():
            tensor.copy_(by_name[name])

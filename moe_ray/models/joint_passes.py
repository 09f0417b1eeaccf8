"""A model that several processes hold together, FSDP2's parts of it, and that one of them works with.

FSDP2 gathers a layer's tensors from all processes whenever one of them computes the layer, so a pass of one is a pass of
all. The leader, rank 0, does the work: every pass that it runs is announced, and the others run an empty one beside it,
which gives them nothing but their part in the gathering. So what the leader computes, and everything around its passes
(what is stored, in which order, how many tokens at a time), is as in a process that has the whole model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from moe_ray.errors import InputError, MoeRayError
from moe_ray.models.moe_layers import find_moe_layers
from moe_ray.models.sharded_storage import free_gathered

_NEW_LINE: Final = "\n"
_CALL: Final = -1
"""Is announced before a call; a pass is announced by the number of what runs, see `_parts`."""


class PassBroken(MoeRayError):
    """A pass that the others have begun did not come to its end, so they wait in it: these processes are of no more use."""


class Leader:
    """Announces every pass of rank 0 to the other processes of `torch.distributed`'s default group, which `follow`.

    Passes run one at a time, whichever thread asks for them, and without gradients.

    Args:
        model: sharded over all processes of the group; its passes, and those of its body, are announced from now on.

    Raises:
        InputError: routers of the model choose by a bias that is sharded, so no mask could lower it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        _refuse_sharded_biases(model)
        self._lock, self._is_inside, self._broken = threading.RLock(), False, ""
        for number, (part, run) in enumerate(_parts(model)):
            _announced(part, partial(self._run, number, run))
        # Generation would go on until every process has ended its own.
        model.generate = partial(model.generate, synced_gpus=False)
        # FSDP2 takes the first module that runs for the root of all, and keeps tensors that it makes then: none of them may
        # be of inference mode, outside which they could not be written.
        with torch.no_grad():
            model(**_two_tokens(model))

    def tell(self, name: str, *values: Any) -> None:
        """Has the others make a call of theirs, see `follow`; what this process does then may be collective with it.

        Args:
            name: of the call.
            values: its arguments; small, and plain.
        """
        with self._lock:
            self._refuse_broken()
            _say(_CALL)
            dist.broadcast_object_list([(name, values)], src=0, device=_CPU)

    def _run(self, number: int, run: _Pass, *args: Any, **kwargs: Any) -> Any:
        """A pass of one of the parts, or what a pass calls within itself."""
        with self._lock:
            if self._is_inside:
                return run.inner(*args, **kwargs)
            self._refuse_broken()
            if torch.is_grad_enabled():
                raise RuntimeError(
                    "a model that several processes hold was run with gradients, whose backward the others would not join; "
                    "this is a fault of ours"
                )
            self._is_inside = True
            try:
                _say(number)
                return run(*args, **kwargs)
            except Exception as error:
                self._broken = f"{type(error).__name__}: {str(error).strip().partition(_NEW_LINE)[0][:200]}"
                raise PassBroken(self._in_words()) from error
            finally:
                self._is_inside = False

    def _refuse_broken(self) -> None:
        if self._broken:
            raise PassBroken(self._in_words())

    def _in_words(self) -> str:
        return (
            f"a forward pass of a model that {dist.get_world_size()} processes hold together (model.num_shards) broke off, "
            f"and the others wait in it: {self._broken}; where memory ran out, set capture.tokens_per_forward, "
            "evaluate.tokens_per_forward or ablate.tokens_per_forward lower, and run the same command again"
        )


def follow(model: PreTrainedModel, calls: Mapping[str, Callable[..., object]]) -> None:
    """Takes part in the passes of rank 0, and in the calls that it tells of; never returns by itself.

    Args:
        model: sharded over all processes of `torch.distributed`'s default group.
        calls: by name, what `Leader.tell` may ask for.
    """
    passes = [run for _, run in _parts(model)]
    while True:
        if (number := _hear()) == _CALL:
            told: list[Any] = [None]
            dist.broadcast_object_list(told, src=0, device=_CPU)
            name, values = told[0]
            calls[name](*values)
        else:
            with torch.no_grad():
                passes[number](**_two_tokens(model))


_CPU = torch.device("cpu")


class _Pass:
    """A pass of the whole model or of a part of it, that FSDP2 takes for one of the model, and so ends what it began.

    Args:
        model: sharded.
        inner: what runs.
        name: that the model gets it under.
    """

    def __init__(self, model: PreTrainedModel, inner: Callable[..., Any], name: str) -> None:
        self.model, self.inner = model, inner
        self._run = inner
        if name:
            setattr(model, name, MethodType(lambda _, *args, **kwargs: inner(*args, **kwargs), model))
            register_fsdp_forward_method(model, name)
            self._run = getattr(model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._run(*args, **kwargs)
        free_gathered(self.model)
        return output


def _parts(model: PreTrainedModel) -> list[tuple[nn.Module, _Pass]]:
    """What a pass may run, and how: the model, or its body without the language-model head."""
    body: nn.Module = model.base_model
    whole = (model, _Pass(model, MethodType(type(model).__call__, model), ""))
    if body is model:
        return [whole]
    return [whole, (body, _Pass(model, MethodType(type(body).__call__, body), "_joint_body"))]


def _say(number: int) -> None:
    dist.broadcast(torch.tensor(number, device=_CPU), src=0)


def _hear() -> int:
    heard = torch.zeros((), dtype=torch.int64, device=_CPU)
    dist.broadcast(heard, src=0)
    return int(heard)


def _two_tokens(model: nn.Module) -> dict[str, Any]:
    """What an empty pass runs on."""
    device = next(model.parameters()).device
    return {"input_ids": torch.zeros(1, 2, dtype=torch.int64, device=device), "use_cache": False}


def _announced(part: nn.Module, run: Callable[..., Any]) -> None:
    """Has every call of the module be a call of `run`; hooks would not hear of an error in another hook."""
    kind: Any = type(part)
    call = {"__call__": lambda _, *args, **kwargs: run(*args, **kwargs), "__module__": kind.__module__}
    part.__class__ = type(kind.__name__, (kind,), call)


def _refuse_sharded_biases(model: PreTrainedModel) -> None:
    for layer in find_moe_layers(model):
        if any(isinstance(bias, DTensor) for bias in layer.selection_biases()):
            raise InputError(
                f"{layer.name}: got a router that chooses experts by a trainable bias, which is sharded with the model, "
                "expected one that masks can lower; set model.num_shards=1"
            )

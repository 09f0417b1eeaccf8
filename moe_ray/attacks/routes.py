"""Attacks on the routers: random routes that make an affirmative answer likelier, and routes around the learned experts.

Sources: random routes, Jiang et al. (2026), "Sparse Models, Sparse Safety: Unsafe Routes in Mixture-of-Experts LLMs"
(F-SOUR), arXiv 2602.08621; silenced experts, Lai et al. (2025), SAFEx, arXiv 2506.17368, and te Lintelo et al. (2026),
"Large Language Lobotomy", arXiv 2602.08741.

F-SOUR goes through a prompt token by token and layer by layer; here a layer has one set of experts for all tokens of a
prompt, which saves as many passes as the prompt has tokens. As there, sets have as many experts as a token uses, a set is
kept where it makes the affirmation likelier, and the answer's own tokens are routed naturally.

Shape suffixes: B rows, N prompts, D drawn sets, L MoE layers, E experts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_ray.attacks.first_tokens import affirmation, affirmative_tokens
from moe_ray.experts import Mask
from moe_ray.models.moe_layers import find_moe_layers
from moe_ray.models.token_budget import TokenBudget
from moe_ray.models.tokenization import pad_token_id
from moe_ray.routing.masking import route_rows_through


@dataclass(frozen=True, kw_only=True)
class Routes:
    """What a search found.

    Attributes:
        masks_NLE: (N, L, E) bool, True = the prompt's tokens may be routed there; a layer that is all True is left natural.
        before: (N,) log-probability of the likeliest affirmative first token under natural routing.
        after: (N,) the same through the masks; never less.
    """

    masks_NLE: npt.NDArray[np.bool_]
    before: npt.NDArray[np.float64]
    after: npt.NDArray[np.float64]


def random_set(generator: np.random.Generator, num_experts: int, size: int) -> npt.NDArray[np.bool_]:
    """(E,) `size` experts at random."""
    chosen_E = np.zeros(num_experts, dtype=bool)
    chosen_E[generator.permutation(num_experts)[:size]] = True
    return chosen_E


def search_routes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    names: Sequence[str],
    *,
    affirmations: Sequence[str],
    draws: int,
    seed: int,
    budget: TokenBudget,
) -> Routes:
    """For each prompt, the best of `draws` random sets of experts in every layer in turn, where one is better than before.

    Args:
        model: in eval mode.
        tokenizer: its tokenizer.
        prompts: token ids.
        names: of the prompts; each draws its own random numbers, whichever others are searched with it.
        affirmations: beginnings of an affirmative answer.
        draws: sets that are tried in a layer.
        seed: of the sets.
        budget: of tokens that run at once.

    Raises:
        InputError: no affirmation has a token, or the model's experts cannot be masked.
    """
    layers, pad_id = find_moe_layers(model), pad_token_id(tokenizer)
    ids = affirmative_tokens(tokenizer, affirmations)
    size = layers.num_experts_per_tok
    generators = [np.random.default_rng(_number(f"{seed}/{name}")) for name in names]
    masks_NLE = np.ones((len(prompts), len(layers), layers.num_experts), dtype=bool)

    def scores(rows: Sequence[int], masks_BLE: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
        found = np.empty(len(rows))

        def work(group: list[int]) -> Any:
            with route_rows_through(model, masks_BLE[group]):
                return affirmation(model, [prompts[rows[row]] for row in group], ids, pad_id=pad_id).numpy()

        for group, values in budget.run_all([len(prompts[row]) for row in rows], work):
            found[group] = values
        return found

    every = list(range(len(prompts)))
    before = scores(every, masks_NLE)
    best = before.copy()
    tried = np.repeat(every, draws).tolist()
    for layer in range(len(layers)):
        candidates_BLE = np.repeat(masks_NLE, draws, axis=0)
        for row, prompt in enumerate(tried):
            candidates_BLE[row, layer] = random_set(generators[prompt], layers.num_experts, size)
        found_ND = scores(tried, candidates_BLE).reshape(len(prompts), draws)
        for prompt in every:
            draw = int(found_ND[prompt].argmax())
            if found_ND[prompt, draw] > best[prompt]:
                best[prompt] = found_ND[prompt, draw]
                masks_NLE[prompt, layer] = candidates_BLE[prompt * draws + draw, layer]
    return Routes(masks_NLE=masks_NLE, before=before, after=best)


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@contextmanager
def prompts_routed_through(model: nn.Module, masks_BLE: npt.NDArray[np.bool_]) -> Iterator[None]:
    """The first forward pass in this context is routed through each row's mask, all after it naturally.

    The first pass of a generation is that over the prompts; the tokens of answers come one by one after it.

    Args:
        model: a transformers MoE model.
        masks_BLE: (B, L, E), see `route_rows_through`.
    """
    with ExitStack() as masked:
        masked.enter_context(route_rows_through(model, masks_BLE))

        def end(*_: Any) -> None:
            masked.close()

        handle = model.register_forward_hook(end)
        try:
            yield
        finally:
            handle.remove()


def silencing(union_LE: Mask, *, num_experts_per_tok: int) -> tuple[Mask, Mask]:
    """Where tokens may go so that none reaches a learned expert, and which experts are silenced so.

    A layer in which fewer others are left than a token uses is left natural: its experts cannot be silenced without
    changing how many a token uses.

    Args:
        union_LE: (L, E) the learned experts.
        num_experts_per_tok: the router's k.

    Returns:
        (L, E) allowed experts, and (L, E) those that are silenced.
    """
    enough_L1 = (~union_LE).sum(axis=1, keepdims=True) >= num_experts_per_tok
    silenced_LE: Mask = np.logical_and(union_LE, enough_L1)
    return ~silenced_LE, silenced_LE

"""Routes that an inference engine has recorded, checked and turned into counts.

vLLM gives them for each request with `enable_return_routed_experts`: for every token that went through the model the
experts of every decoder layer, dense layers included (`RequestOutput.outputs[0].routed_experts`). The last generated token
never goes through it. What is recorded wrongly looks much like what is recorded rightly, so nothing is repaired or guessed
here: a row of any known wrong form ends the reading. What no single array shows, such as rows that belong to the token
before, is seen by holding the first window against the same tokens in transformers (`compare_routes`).

Shape suffixes: S tokens, D decoder layers, L MoE layers, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_ray.errors import InputError
from moe_ray.models.moe_layers import MoELayers
from moe_ray.models.tokenization import TokenizedRow, pad_rows
from moe_ray.routing.counts import ROLES

Routes = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class RoutedModel:
    """What is known of the model that an engine ran.

    Attributes:
        num_decoder_layers: dense ones included.
        layers: decoder layer index of each MoE layer, ascending.
        num_experts: of a layer, without shared ones.
        num_experts_per_tok: routed for a token.
    """

    num_decoder_layers: int
    layers: Sequence[int]
    num_experts: int
    num_experts_per_tok: int

    @classmethod
    def of(cls, moe_layers: MoELayers, num_decoder_layers: int) -> RoutedModel:
        """What is known of a model with these layers."""
        return cls(
            num_decoder_layers=num_decoder_layers,
            layers=moe_layers.layers,
            num_experts=moe_layers.num_experts,
            num_experts_per_tok=moe_layers.num_experts_per_tok,
        )


def read_routes(
    routes_SDK: npt.NDArray[np.integer], model: RoutedModel, *, num_prompt_tokens: int, num_generated_tokens: int = 1
) -> Routes:
    """The experts of every token and MoE layer, from what an engine recorded of one request.

    Args:
        routes_SDK: ids, unsigned or signed; a row for each token of the prompt and each generated one but the last. Dense
            layers are all zero.
        model: that was run.
        num_prompt_tokens: that were given; for a text that is given whole, all of its tokens.
        num_generated_tokens: 1 where nothing but the text given is asked about.

    Returns:
        (S, L, K) ids, in the order recorded.

    Raises:
        InputError: the array has another shape or type, a dense layer has routes, or a token of a MoE layer has an id that
            is no expert's or one twice (as rows that were never filled have, where K is above 1).
    """
    if not np.issubdtype(routes_SDK.dtype, np.integer):
        raise _wrong(f"got numbers of type {routes_SDK.dtype}, expected ids as integers")
    num_rows = num_prompt_tokens + num_generated_tokens - 1
    expected = (num_rows, model.num_decoder_layers, model.num_experts_per_tok)
    if routes_SDK.shape != expected:
        raise _wrong(
            f"got shape {routes_SDK.shape}, expected {expected}: {num_prompt_tokens} tokens of the prompt and "
            f"{num_generated_tokens} generated ones but the last, decoder layers, experts per token"
        )
    is_moe_D = np.zeros(model.num_decoder_layers, dtype=bool)
    is_moe_D[list(model.layers)] = True
    if (routed := routes_SDK[:, ~is_moe_D].any(axis=(0, 2))).any():
        layer = int(np.flatnonzero(~is_moe_D)[np.argmax(routed)])
        raise _wrong(f"got routes in layer {layer}, which has no experts, expected zeros; layers may be shifted")
    ids_SLK = routes_SDK[:, is_moe_D].astype(np.int64)
    if (out := (ids_SLK < 0) | (ids_SLK >= model.num_experts)).any():
        token, row, place = (int(index) for index in np.argwhere(out)[0])
        raise _wrong(
            f"token {token}, layer {model.layers[row]}: got expert {ids_SLK[token, row, place]}, expected 0 to "
            f"{model.num_experts - 1}; an engine that places copies of experts may record places instead"
        )
    sorted_SLK = np.sort(ids_SLK, axis=2)
    if (repeated := (sorted_SLK[:, :, 1:] == sorted_SLK[:, :, :-1]).any(axis=2)).any():
        token, row = (int(index) for index in np.argwhere(repeated)[0])
        raise _wrong(
            f"token {token}, layer {model.layers[row]}: got experts {ids_SLK[token, row].tolist()}, expected "
            f"{model.num_experts_per_tok} different ones; the row may never have been filled"
        )
    return ids_SLK


def count_routes(ids_SLK: Routes, num_experts: int) -> npt.NDArray[np.int32]:
    """How many of these tokens were routed to each expert, (L, E); a role's counts come from its tokens' rows."""
    num_layers = ids_SLK.shape[1]
    places = ids_SLK + num_experts * np.arange(num_layers)[:, None]
    counts = np.bincount(places.ravel(), minlength=num_layers * num_experts)
    return counts.reshape(num_layers, num_experts).astype(np.int32)


@dataclass(frozen=True, kw_only=True)
class RowCounts:
    """Counts of B rows from their routes, in the form of `count_rows`.

    Attributes:
        counts: (B, 3, L, E) int32; the second axis is that of `ROLES`.
        num_tokens: (B, 3) int64, counted ones.
        ids: for each of the B * 3 segments the (tokens, L, K) experts of its tokens in order, uint8, or uint16 above 256.
    """

    counts: npt.NDArray[np.int32]
    num_tokens: npt.NDArray[np.int64]
    ids: list[npt.NDArray[np.unsignedinteger]]


def count_row_routes(rows: Sequence[TokenizedRow], routes: Sequence[Routes], num_experts: int) -> RowCounts:
    """Counts the routes of rows by the role of each token; tokens that do not count are left out.

    Args:
        rows: at least one.
        routes: from `read_routes`, of each row's tokens.
        num_experts: of a layer.
    """
    kind = np.uint8 if num_experts <= 256 else np.uint16
    counts, num_tokens, ids = [], [], []
    for row, ids_SLK in zip(rows, routes, strict=True):
        roles_S = pad_rows([row], pad_id=0).roles_BS[0].numpy()
        for role in range(len(ROLES)):
            of_role = ids_SLK[roles_S == role]
            counts.append(count_routes(of_role, num_experts))
            num_tokens.append(len(of_role))
            ids.append(of_role.astype(kind))
    shape = (len(rows), len(ROLES))
    return RowCounts(
        counts=np.stack(counts).reshape(*shape, *counts[0].shape),
        num_tokens=np.array(num_tokens, dtype=np.int64).reshape(shape),
        ids=ids,
    )


@dataclass(frozen=True)
class Parity:
    """How far two recordings of the same tokens agree.

    Attributes:
        num_choices: tokens times MoE layers.
        share_equal: of them with the same set of experts.
        share_shifted: the largest share if one recording is moved by a token, either way; 0 for a single token.
    """

    num_choices: int
    share_equal: float
    share_shifted: float


def compare_routes(theirs_SLK: Routes, own_SLK: Routes, *, least: float = 0.99) -> Parity:
    """Holds an engine's routes against transformers' own of the same tokens.

    Near-ties fall differently under other kernels and number types, so equality is not asked for.

    Args:
        theirs_SLK: from `read_routes`.
        own_SLK: counted by transformers, in the same number type.
        least: share of choices that must be the same set.

    Raises:
        InputError: fewer are, or the arrays are of different tokens; where a shift by one token agrees better, it says so.
    """
    if theirs_SLK.shape != own_SLK.shape:
        raise _wrong(f"got shape {theirs_SLK.shape}, expected {own_SLK.shape}, that of the same tokens in transformers")
    theirs, own = np.sort(theirs_SLK, axis=2), np.sort(own_SLK, axis=2)

    def share(one: Routes, other: Routes) -> float:
        return float((one == other).all(axis=2).mean()) if one.size else 0.0

    shifted = max(share(theirs[1:], own[:-1]), share(theirs[:-1], own[1:]))
    parity = Parity(theirs.shape[0] * theirs.shape[1], share(theirs, own), shifted)
    if parity.share_equal < least:
        moved = (
            f"; moved by one token {parity.share_shifted:.1%} are, so rows belong to a neighbour"
            if (parity.share_shifted > parity.share_equal)
            else ""
        )
        raise _wrong(
            f"{parity.share_equal:.1%} of {parity.num_choices} choices are those of transformers, expected {least:.1%} or "
            f"more{moved}"
        )
    return parity


def _wrong(what: str) -> InputError:
    return InputError(f"routes recorded by the engine: {what}; count with transformers instead")

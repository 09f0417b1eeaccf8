"""What identification of some batches says of each, small enough to be sent: its unsafe experts and how certain they are.

The driver of a distributed identification joins these, and never sees a risk table.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from moe_ray.config.identify import IdentifyConfig
from moe_ray.errors import NothingSelected
from moe_ray.experts import Expert, ExpertMasks, masks_from_experts
from moe_ray.identification.confounds import selections_by_weighting
from moe_ray.identification.filters import nothing_selected
from moe_ray.identification.identify import certainty_per_batch
from moe_ray.identification.selection import SCORE_COLUMN, ranking_column, select_batches

CERTAINTY = "certainty.parquet"
"""Of a finished identification, in the stage's folder: `findings_of` without the experts, a row per batch."""

_EXPERTS, _SCORE = "experts", "largest_score"


class Findings(NamedTuple):
    """What was found in all batches.

    Attributes:
        masks: of every batch.
        certainty: from `certainty_per_batch`; also `largest_risk_diff` of each batch, and `jaccard`, see
            `confounds.selections_by_weighting`.
    """

    masks: ExpertMasks
    certainty: pd.DataFrame


def findings_of(risk: pd.DataFrame, config: IdentifyConfig, *, seed: int) -> pa.Table:
    """A row per batch of a risk table; `joined` makes masks and certainty of them.

    Args:
        risk: from `identify`, of some batches.
        config: the configuration of both.
        seed: of rule `random`.
    """
    selected = select_batches(risk, config, seed=seed)
    layers = [int(layer) for layer in np.unique(risk["layer"])]
    masks = masks_from_experts(selected, layers=layers, num_experts=int(risk["expert"].max()) + 1)
    certainty = certainty_per_batch(risk, masks, config)
    by_batch = risk.groupby("batch_idx", sort=True)
    certainty["largest_risk_diff"] = by_batch[SCORE_COLUMN[config.weighting]].max().to_numpy()
    certainty[_SCORE] = by_batch[ranking_column(config)].max().to_numpy()
    certainty["jaccard"] = selections_by_weighting(risk, config)["jaccard"].to_numpy()
    # A column of nothing but None would have a type of its own, and parts of a run would differ.
    certainty["is_significant"] = certainty["is_significant"].astype("boolean")
    table = pa.Table.from_pandas(certainty, preserve_index=False)
    flat = [[number for expert in selected[batch] for number in expert] for batch in certainty["batch_idx"]]
    return table.append_column(_EXPERTS, pa.array(flat, type=pa.list_(pa.int32())))


def joined(
    tables: Iterable[pa.Table], config: IdentifyConfig, *, layers: tuple[int, ...], num_experts: int
) -> Findings:
    """Masks and certainty of all batches, ascending by `batch_idx`.

    Args:
        tables: from `findings_of`, in any order.
        config: that they were made with.
        layers: of the model.
        num_experts: of a layer.

    Raises:
        InputError: no batch has any unsafe expert.
    """
    table = pa.concat_tables(tables).sort_by("batch_idx")
    flat, lists = table[_EXPERTS].combine_chunks(), table.drop_columns([_EXPERTS])
    certainty = lists.to_pandas()
    pairs = flat.flatten().to_numpy().reshape(-1, 2)
    if not len(pairs):
        largest, smallest_p = float(certainty[_SCORE].max()), float(certainty["smallest_p_maxt"].min())
        raise NothingSelected(
            nothing_selected(largest, smallest_p, config, len(certainty), column=ranking_column(config))
        )
    ends = np.cumsum(flat.value_lengths().to_numpy()) // 2
    experts = [Expert(layer, expert) for layer, expert in pairs.tolist()]
    selected = {
        batch: tuple(experts[start:end])
        for batch, start, end in zip(certainty["batch_idx"].tolist(), [0, *ends[:-1]], ends, strict=True)
    }
    masks = masks_from_experts(selected, layers=layers, num_experts=num_experts)
    # None where nothing was tested, as in memory, rather than pandas' own missing value.
    known = certainty["is_significant"]
    certainty["is_significant"] = (
        known.astype(bool) if known.notna().all() else known.astype(object).where(known.notna(), None)
    )
    return Findings(masks, certainty.drop(columns=_SCORE))

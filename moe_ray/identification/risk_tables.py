"""The risk table of a run as Parquet parts, and how a batch, a mean or a maximum is read from it.

A table of all batches does not fit a process: a batch of 48 layers x 128 experts has 6,144 rows of 18 columns, so 100,000
batches are 88 GB. Each task of identification writes the rows of its batches as one part, with a row group for each batch,
and readers take a batch after the other. `pandas.read_parquet` of the folder gives the whole table where it does fit.

What reads risk takes either, a table in memory or the parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pandas as pd

from moe_ray.errors import InputError
from moe_ray.identification.risk import Floats, add_rates
from moe_ray.storage.folder import Folder

_PREFIX = "part-"
_EXPERT = ["layer", "expert"]
_MEANS = (
    "risk_diff",
    "a_safe_n",
    "a_unsafe_n",
    "risk_diff_prompt",
    "risk_diff_activation",
    "attribution_diff",
    "gate_diff",
    "gate_refuse_diff",
    "comply_refuse_diff",
    "reap_diff",
)
_TOKENS = ("a_safe", "d_safe", "a_unsafe", "d_unsafe")


@dataclass(frozen=True, repr=False)
class RiskParts:
    """A risk table in parts; each holds the batches from the first to the last that its name says.

    Attributes:
        folder: of the parts.
    """

    folder: Folder

    def __repr__(self) -> str:
        return f"RiskParts({len(self._parts)} parts in {self.folder.url})"

    def __contains__(self, column: object) -> bool:
        """Whether the table has a column, as of a DataFrame."""
        return column in self.columns

    @cached_property
    def _parts(self) -> list[tuple[int, int, str]]:
        """First and last batch and name of every part, ascending."""
        return sorted((*_batches_of(name), name) for name in self.folder.parquet_names())

    @cached_property
    def _batches(self) -> dict[str, npt.NDArray[np.int64]]:
        """The batches of each part's row groups, of parts that were asked for one."""
        return {}

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Names of the table's columns."""
        if not self._parts:
            raise InputError(f"no part of a risk table in {self.folder.url}; run the identify stage again")
        with self.folder.open_parquet(self._parts[0][2]) as file:
            return tuple(file.schema_arrow.names)

    @property
    def num_bytes(self) -> int:
        """Size of all parts."""
        return sum(int(self.folder.fs.size(self.folder.file(name))) for *_, name in self._parts)

    @property
    def names(self) -> list[str]:
        """File names of the parts."""
        return [name for *_, name in self._parts]

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, pd.DataFrame]]:
        """Yields each batch and its rows, ascending by `batch_idx`; holds one batch.

        Args:
            columns: to read; None = all. `batch_idx, layer, expert` always are there.
        """
        wanted = None if columns is None else list(dict.fromkeys(["batch_idx", *_EXPERT, *columns]))
        for *_, name in self._parts:
            with self.folder.open_parquet(name, needs=wanted or ["batch_idx", *_EXPERT]) as file:
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group, columns=wanted, use_threads=False).to_pandas()
                    yield int(table["batch_idx"].iloc[0]), table

    def batch(self, batch_idx: int) -> pd.DataFrame:
        """The rows of one batch; only they are read.

        Raises:
            InputError: there is no such batch.
        """
        for first, last, name in self._parts:
            if first <= batch_idx <= last:
                with self.folder.open_parquet(name, needs=["batch_idx", *_EXPERT]) as file:
                    if name not in self._batches:
                        self._batches[name] = file.read(columns=["batch_idx"])["batch_idx"].unique().to_numpy()
                    found = np.flatnonzero(self._batches[name] == batch_idx)
                    if len(found):
                        table: pd.DataFrame = file.read_row_group(int(found[0])).to_pandas()
                        return table
        raise InputError(f"no risk table of batch {batch_idx} in {self.folder.url}; give a batch that has a mask")

    def frame(self) -> pd.DataFrame:
        """The whole table; only for runs whose table fits memory."""
        return pd.concat([self.folder.read_frame(name) for name in self.names], ignore_index=True)

    @cached_property
    def aggregated(self) -> pd.DataFrame:
        """`aggregate_risk` of the parts, which are read once."""
        means = [name for name in _MEANS if name in self]
        sums, names, num, first = _Sums(len(means)), [*means, *_TOKENS], 0, None
        tokens_XT: npt.NDArray[np.int64] | None = None
        for _, table in self.tables(names):
            sums.add(table[means].to_numpy(dtype=np.float64))
            of_batch_XT = table[list(_TOKENS)].to_numpy()
            tokens_XT = of_batch_XT if tokens_XT is None else tokens_XT + of_batch_XT
            first, num = table[_EXPERT] if first is None else first, num + 1
        if first is None or tokens_XT is None:
            raise InputError(f"no part of a risk table in {self.folder.url}; run the identify stage again")
        table = pd.DataFrame(sums.total / num, columns=means)
        table["risk_diff_sum"] = sums.total[:, means.index("risk_diff")]
        tokens = pd.DataFrame(tokens_XT, columns=list(_TOKENS))
        table["risk_diff_pooled"] = add_rates(tokens)["risk_diff"]
        table = table.join(tokens.add_suffix("_sum"))
        table["num_batches"] = num
        return _ordered(pd.concat([first.reset_index(drop=True), table], axis=1))


Risk = pd.DataFrame | RiskParts
"""A risk table, in memory or in parts."""


class _Sums:
    """Sums with Kahan's compensation, which is how pandas adds: the same digits as of the whole table."""

    def __init__(self, num_columns: int) -> None:
        self.total: Floats = np.zeros((1, num_columns))
        self._lost: Floats = np.zeros((1, num_columns))

    def add(self, values: Floats) -> None:
        values = values - self._lost
        total = self.total + values
        self._lost = total - self.total - values
        self.total = total


def write_part(folder: Folder, risk: pd.DataFrame) -> None:
    """Writes the rows of some batches, ordered by batch, layer and expert, as a part.

    Args:
        folder: of the parts.
        risk: from `identify`; each batch has as many rows.
    """
    batches = risk["batch_idx"].unique()
    folder.write_table(part_name(batches), risk, row_group_size=len(risk) // len(batches))


def part_name(batches: Sequence[int] | npt.NDArray[np.int64]) -> str:
    """File name of the part that holds some batches, ascending."""
    return f"{_PREFIX}{batches[0]:08d}-{batches[-1]:08d}.parquet"


def _batches_of(name: str) -> tuple[int, int]:
    first, _, last = name.removeprefix(_PREFIX).partition(".")[0].partition("-")
    return int(first), int(last)


def batch_tables(risk: Risk, columns: Sequence[str] | None = None) -> Iterator[tuple[int, pd.DataFrame]]:
    """Yields each batch and its rows, ascending by `batch_idx`.

    Args:
        risk: in any row order.
        columns: that are needed, so that no others are read; None = all.
    """
    if isinstance(risk, RiskParts):
        yield from risk.tables(columns)
        return
    names = risk["batch_idx"].to_numpy()
    if (np.diff(names) < 0).any():
        risk = risk.iloc[np.argsort(names, kind="stable")]
        names = risk["batch_idx"].to_numpy()
    starts = [*np.flatnonzero(np.diff(names, prepend=names[0] - 1)), len(names)] if len(names) else []
    for start, end in pairwise(starts):
        yield int(names[start]), risk.iloc[start:end]


def shape_of(risk: Risk) -> tuple[list[int], int]:
    """The layers of a risk table, ascending, and the number of experts of a layer."""
    table = next(risk.tables(_EXPERT))[1] if isinstance(risk, RiskParts) else risk
    return [int(layer) for layer in np.unique(table["layer"])], int(table["expert"].max()) + 1


def batch_table(risk: Risk, batch_idx: int) -> pd.DataFrame:
    """The rows of one batch."""
    return risk.batch(batch_idx) if isinstance(risk, RiskParts) else risk[risk["batch_idx"] == batch_idx]


def aggregate_risk(risk: Risk) -> pd.DataFrame:
    """One row per layer and expert over all batches, the largest mean `risk_diff` first, ties by (layer, expert).

    Columns: `layer, expert`; the means over batches `risk_diff, a_safe_n, a_unsafe_n` and, where `risk` has them, of the
    other differences; `risk_diff_sum` and the token sums `a_safe_sum`, `d_safe_sum`, `a_unsafe_sum`, `d_unsafe_sum`;
    `risk_diff_pooled`, the difference of the summed tokens' rates; `num_batches`.
    """
    if isinstance(risk, RiskParts):
        return risk.aggregated
    grouped = risk.groupby(_EXPERT, sort=True)
    table = grouped[[name for name in _MEANS if name in risk]].mean()
    table["risk_diff_sum"] = grouped["risk_diff"].sum()
    tokens = grouped[list(_TOKENS)].sum()
    table["risk_diff_pooled"] = add_rates(tokens)["risk_diff"]
    table = table.join(tokens.add_suffix("_sum"))
    table["num_batches"] = grouped.size()
    return _ordered(table.reset_index())


def mean_by_category(risk: Risk, category_of: dict[int, str]) -> pd.DataFrame:
    """The mean `risk_diff` of each category's batches: a row `category, layer, expert, risk_diff`.

    Args:
        risk: of all batches.
        category_of: per `batch_idx`; batches without one are left out.
    """
    sums, sizes, experts = dict[str, _Sums](), dict[str, int](), dict[str, pd.DataFrame]()
    for batch_idx, table in batch_tables(risk, ["risk_diff"]):
        category = category_of.get(batch_idx)
        if category is not None:
            table = table.sort_values(_EXPERT)
            sums.setdefault(category, _Sums(1)).add(table[["risk_diff"]].to_numpy(dtype=np.float64))
            sizes[category] = sizes.get(category, 0) + 1
            experts.setdefault(category, table[_EXPERT].reset_index(drop=True))
    parts = [
        experts[category].assign(category=category, risk_diff=sums[category].total[:, 0] / size)
        for category, size in sizes.items()
    ]
    return pd.concat(parts, ignore_index=True)[["category", *_EXPERT, "risk_diff"]]


def _ordered(table: pd.DataFrame) -> pd.DataFrame:
    return table.sort_values(["risk_diff", *_EXPERT], ascending=[False, True, True], ignore_index=True)

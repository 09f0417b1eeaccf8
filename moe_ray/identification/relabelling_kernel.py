"""The compiled way to count relabellings: what `relabelling_kernel.c` computes, called with numpy's arrays.

It serves prompts without pairs. Of all relabellings, such as the 12,870 of 8 safe and 8 unsafe prompts, every sum over a set
of examples is one of few sums over the first half plus one of few over the second, so that it makes them itself; drawn ones
come as numpy's products.

Shape suffixes: X experts, N examples, P relabellings, M single values.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_ray.identification.relabelling_library import library
from moe_ray.identification.relabellings import Relabellings
from moe_ray.identification.risk import Floats
from moe_ray.identification.studentised import Reals, Studentised

MOST_NEAR = 64
"""Relabellings too near an expert's bound to be told in single precision; with more, the expert is counted in double."""

_MOST_EXAMPLES = 24
_REGISTER = 16
_BLOCK_BYTES = 1_500_000
_VALUES_PER_COLUMN, _LEAST_ROOM = 48, 1 << 16


class _Halves(ctypes.Structure):
    """As in the C file."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_first", "num_second", "num_runs", "num_columns", "widest_run")),
        *((name, ctypes.c_void_p) for name in ("run_start", "run_first", "run_second", "second")),
        ("num_listed", ctypes.c_int64),
        ("relabelling", ctypes.c_void_p),
    )


class _Found(ctypes.Structure):
    """As in the C file."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("expert", "column", "value")),
        ("num", ctypes.c_int64),
        ("most", ctypes.c_int64),
    )


class _SearchOfC(ctypes.Structure):
    """As in the C file."""

    _fields_ = (
        ("low_X", ctypes.c_void_p),
        ("high_X", ctypes.c_void_p),
        ("margin", ctypes.c_float),
        ("is_mirrored", ctypes.c_int32),
        ("most_near", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("sure_X", "near_X", "top_P", "bottom_P", "values")),
        *((name, _Found) for name in ("near", "largest", "least")),
    )


class _Search:
    """What the C code looks for, and the arrays that it writes into."""

    def __init__(self, low_X: Reals, high_X: Reals, *, margin: float, is_mirrored: bool, columns: int) -> None:
        num, room = len(low_X), _LEAST_ROOM + _VALUES_PER_COLUMN * columns
        self.sure_X, self.near_X = np.zeros(num, np.int64), np.zeros(num, np.int64)
        self._edges = [np.ascontiguousarray(edge, np.float32) for edge in (low_X, high_X)]
        self._room = [np.full(columns, sign * np.inf, np.float32) for sign in (-1, 1)] + [np.empty(columns, np.float32)]
        self._lists = [
            (np.empty(most, np.int32), np.empty(most, np.int32), np.empty(most, np.float32))
            for most in (MOST_NEAR * num, room, room)
        ]
        found = [_Found(*map(_at, arrays), 0, len(arrays[0])) for arrays in self._lists]
        counts = map(_at, (self.sure_X, self.near_X, *self._room))
        self.of_c = _SearchOfC(*map(_at, self._edges), margin, is_mirrored, MOST_NEAR, *counts, *found)

    def found(self) -> tuple[Any, ...]:
        """The fields of `Swept`."""
        numbers = self.of_c.near.num, self.of_c.largest.num, self.of_c.least.num
        lists = ((arrays[0][:num], arrays[1][:num]) for arrays, num in zip(self._lists, numbers, strict=True))
        return self.sure_X, self.near_X, *lists


class _AllOfOneStratum:
    """How all relabellings of one stratum fall into runs that share the first half of the examples."""

    def __init__(self, labels: Relabellings) -> None:
        num = labels.unsafe_NP.shape[0]
        first = (num + 1) // 2
        halves = _bits(labels.unsafe_NP[:first]), _bits(labels.unsafe_NP[first:])
        starts = np.flatnonzero(np.diff(halves[0], prepend=-1))
        widths = np.diff([*starts, len(halves[0])])
        by_size = [_subsets(num - first, size) for size in range(num - first + 1)]
        sizes = labels.unsafe_NP[first:, starts].sum(axis=0).astype(np.int64)
        # What the C code takes for granted of the order in which all relabellings are listed.
        assert all(
            np.array_equal(by_size[size], halves[1][start : start + width])
            for start, width, size in zip(starts, widths, sizes, strict=True)
        )
        filled = [-(-len(subsets) // _REGISTER) * _REGISTER for subsets in by_size]
        offsets = np.cumsum([0, *filled])
        run_starts = np.cumsum([0, *(filled[size] for size in sizes)])
        second = np.zeros(offsets[-1], np.int64)
        for subsets, offset in zip(by_size, offsets, strict=False):
            second[offset : offset + len(subsets)] = subsets
        self.is_real_P = np.zeros(run_starts[-1], bool)
        for start, width in zip(run_starts, widths, strict=False):
            self.is_real_P[start : start + width] = True
        self.relabelling_P = np.maximum(np.cumsum(self.is_real_P) - 1, 0)
        self._arrays = [
            np.ascontiguousarray(values, dtype=np.int32)
            for values in (run_starts, halves[0][starts], offsets[sizes], second, self.relabelling_P)
        ]
        *runs, relabelling = map(_at, self._arrays)
        counts = first, num - first, len(starts), len(self.is_real_P), max(filled)
        self.of_c = _Halves(*counts, *runs, len(second), relabelling)

    def filled(self, values_KP: Floats) -> Floats:
        """The values of each relabelling, and NaN for the columns that fill runs up."""
        values_KP = np.take(values_KP, self.relabelling_P, axis=1)
        return np.ascontiguousarray(np.where(self.is_real_P, values_KP, np.nan))


def _bits(unsafe_NP: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    return np.asarray((1 << np.arange(len(unsafe_NP))) @ unsafe_NP.astype(np.int64))


def _subsets(num: int, size: int) -> npt.NDArray[np.int64]:
    """The subsets of so many examples as bits, in the order of `itertools.combinations`."""
    return np.array([sum(1 << bit for bit in chosen) for chosen in combinations(range(num), size)], dtype=np.int64)


@dataclass(frozen=True)
class Kernel:
    """The compiled functions, for one set of relabellings."""

    compiled: ctypes.CDLL
    unsafe_PN: Floats
    halves: _AllOfOneStratum | None

    def of(self, statistic: Studentised) -> KernelOfBatch:
        """The functions for one batch."""
        return KernelOfBatch(self, statistic)


@lru_cache(maxsize=8)
def kernel_of(labels: Relabellings) -> Kernel | None:
    """The kernel for a set of relabellings of prompts without pairs; None where it cannot be built."""
    compiled = library()
    if compiled is None:
        return None
    is_whole = labels.is_exact and 2 <= labels.unsafe_NP.shape[0] <= _MOST_EXAMPLES
    unsafe_PN = np.ascontiguousarray(labels.unsafe_NP.T, dtype=np.float64)
    return Kernel(compiled, unsafe_PN, _AllOfOneStratum(labels) if is_whole else None)


class KernelOfBatch:
    """The compiled functions, for one batch; the arguments are those of `relabelling_counts`."""

    def __init__(self, kernel: Kernel, statistic: Studentised) -> None:
        self._compiled, self._unsafe_PN, self._halves = kernel.compiled, kernel.unsafe_PN, kernel.halves
        self._statistic = statistic
        self._sources = [
            np.ascontiguousarray(rows, dtype=np.float64)
            for rows in (statistic.linear_XN, statistic.square_XM, statistic.cross_XM)
        ]
        self._sums = [rows.sum(axis=1) for rows in self._sources[1:]]
        self._coefficients_6P = np.stack(
            [
                statistic.linear_P,
                *_of_unsafe_and_all(statistic.square_MP, statistic.unsafe_NP),
                *_of_unsafe_and_all(statistic.cross_MP, statistic.unsafe_NP),
                statistic.curve_P,
            ]
        )

    @property
    def counts_exactly(self) -> bool:
        """Whether `count_exactly` serves these relabellings."""
        return self._halves is not None

    def sweep(self, low_X: Reals, high_X: Reals, *, margin: float, is_mirrored: bool) -> tuple[Any, ...] | None:
        """`Swept`'s fields, or None where the kernel has no room for all that it found."""
        num = self._coefficients_6P.shape[1]
        columns = -(-num // _REGISTER) * _REGISTER if self._halves is None else len(self._halves.is_real_P)
        search = _Search(low_X, high_X, margin=margin, is_mirrored=is_mirrored, columns=columns)
        if self._halves is None:
            failed, relabelling = self._sweep_products(search, columns), None
        else:
            sums = [np.ascontiguousarray(values, np.float32) for values in self._sums]
            coefficients_6P = self._halves.filled(self._coefficients_6P).astype(np.float32)
            failed = self._compiled.sweep(
                ctypes.byref(self._halves.of_c),
                ctypes.byref(search.of_c),
                ctypes.c_int64(len(low_X)),
                *map(_pointer, (*self._sources, *sums, coefficients_6P)),
            )
            relabelling = ctypes.c_void_p(self._halves.of_c.relabelling)
        if failed:
            return None
        self._compiled.keep_extremes(ctypes.byref(search.of_c), relabelling)
        return search.found()

    def _sweep_products(self, search: _Search, columns: int) -> int:
        """The sweep of sums that numpy multiplies out, a block of experts at a time."""
        rows, factors = self._statistic.in_single_precision(columns)
        blocks = np.empty((3, block_size(columns, 4), columns), np.float32)
        # A sum is its own coefficient; a column that only fills the last register up has a value of NaN.
        coefficients_6P = np.zeros((6, columns), np.float32)
        coefficients_6P[[0, 1, 3]] = 1
        coefficients_6P[5] = np.nan
        coefficients_6P[5, : self._statistic.num_columns] = self._statistic.curve_P
        for start in range(0, len(rows[0]), blocks.shape[1]):
            here = min(blocks.shape[1], len(rows[0]) - start)
            for of_kind, factor, out in zip(rows, factors, blocks, strict=True):
                np.matmul(of_kind[start : start + here], factor, out=out[:here])
            where = map(ctypes.c_int64, (start, here, columns))
            failed: int = self._compiled.sweep_rows(
                ctypes.byref(search.of_c), *where, *map(_pointer, (*blocks, coefficients_6P))
            )
            if failed:
                return failed
        return 0

    def elements(self, expert_M: npt.NDArray[np.int32], column_M: npt.NDArray[np.int32]) -> Floats:
        """As `Studentised.elements`."""
        chosen = [np.ascontiguousarray(values, np.int32) for values in (expert_M, column_M)]
        values_M = np.empty(len(expert_M))
        self._compiled.elements(
            *map(ctypes.c_int64, (*self._unsafe_PN.shape[::-1], len(values_M))),
            *map(_pointer, (*chosen, *self._sources, *self._sums, self._coefficients_6P, self._unsafe_PN, values_M)),
        )
        return values_M

    def count_exactly(self, experts: npt.NDArray[np.int64], edge: Floats, *, is_mirrored: bool) -> Any:
        """The relabellings whose value reaches the edge of each of some experts."""
        assert self._halves is not None
        above, filled_6P = np.empty(len(experts), np.int64), self._halves.filled(self._coefficients_6P)
        chosen = np.ascontiguousarray(experts, np.int32)
        edges = np.ascontiguousarray(edge, np.float64)
        failed = self._compiled.count_exactly(
            ctypes.byref(self._halves.of_c),
            ctypes.c_int64(len(above)),
            *map(_pointer, (chosen, *self._sources, *self._sums, filled_6P, edges)),
            ctypes.c_int32(is_mirrored),
            _pointer(above),
        )
        if failed:
            raise MemoryError("no memory for the sums of an expert's relabellings")
        return above


def _of_unsafe_and_all(factor_NP: Reals, unsafe_NP: Reals) -> tuple[Floats, Floats]:
    """(P,) and (P,): by what to multiply the sum over the unsafe examples, and the sum over all."""
    # Of one stratum, examples differ in their label only.
    of_unsafe_P = (factor_NP * unsafe_NP).sum(axis=0) / unsafe_NP.sum(axis=0)
    of_safe_P = (factor_NP * (1 - unsafe_NP)).sum(axis=0) / (1 - unsafe_NP).sum(axis=0)
    return of_unsafe_P - of_safe_P, of_safe_P


def block_size(num_columns: int, bytes_of_value: int) -> int:
    """Experts of a block, of which three blocks of products fit a processor's second-level cache."""
    return max(8, _BLOCK_BYTES // (3 * num_columns * bytes_of_value))


def _at(array: Any) -> int:
    """Where an array lies."""
    return int(array.ctypes.data)


def _pointer(array: Any) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)

"""Ids that are used twice, found among any number of them by 16 bytes each."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt


class RepeatedIds:
    """Remembers ids by a 128-bit hash of each."""

    def __init__(self) -> None:
        self._hashes = bytearray()

    def add(self, text: str) -> None:
        """Adds the next id."""
        encoded = text.encode("utf-8", "surrogatepass")
        self._hashes += hashlib.blake2b(encoded, digest_size=16, usedforsecurity=False).digest()

    def repeated(self) -> npt.NDArray[np.int32]:
        """Positions, counted from 0 and ascending, of ids that were added before."""
        words = np.frombuffer(self._hashes, dtype=np.uint64).reshape(-1, 2)
        ordered = np.sort(words[:, 0])
        if not np.any(ordered[1:] == ordered[:-1]):
            return np.empty(0, dtype=np.int32)
        by_hash = np.lexsort((words[:, 1], words[:, 0]))  # stable: of equal ones the first comes first
        same = np.all(words[by_hash[1:]] == words[by_hash[:-1]], axis=1)
        return np.sort(by_hash[1:][same]).astype(np.int32)

"""Every id that was used before is found, whatever it is and however many there are."""

import random

import numpy as np

from moe_ray.prompts.repeated_ids import RepeatedIds


def found(names):
    ids = RepeatedIds()
    for name in names:
        ids.add(name)
    return ids.repeated().tolist()


def test_ids_that_were_used_before_are_found_where_they_stand():
    for seed in range(20):
        names = [str(random.Random(seed + n).randint(0, 10**seed)) for n in range(300)]
        assert found(names) == [place for place, name in enumerate(names) if name in names[:place]]
    assert found([]) == []
    assert found(["a", "\ud800", "b", "\ud800"]) == [3]


def test_ids_with_half_a_hash_in_common_are_told_apart():
    ids = RepeatedIds()
    ids._hashes = bytearray(np.array([[1, 2], [1, 3], [2, 2], [1, 2]], dtype=np.uint64).tobytes())
    assert ids.repeated().tolist() == [3]

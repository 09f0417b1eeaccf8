"""Batches that can be identified are those with tokens of both labels, whatever parts they are in."""

import pandas as pd

from moe_ray.orchestration.jobs.identify import _groups, batches_with_both_labels


def test_a_batch_counts_as_a_whole_however_its_examples_are_spread_over_parts():
    where = pd.DataFrame(
        [
            {"batch_idx": 0, "part": "a", "safe": 5, "unsafe": 0},
            {"batch_idx": 0, "part": "b", "safe": 0, "unsafe": 4},
            {"batch_idx": 3, "part": "a", "safe": 5, "unsafe": 0},
            {"batch_idx": 3, "part": "b", "safe": 2, "unsafe": 0},
            {"batch_idx": 7, "part": "b", "safe": 1, "unsafe": 1},
        ]
    )
    assert batches_with_both_labels(where) == ([0, 7], [3])


def test_every_batch_is_in_one_task_and_a_larger_model_makes_smaller_tasks():
    batches = list(range(100, 250))
    sizes = []
    for num_experts in (48, 20_000, 1_000_000):
        groups = _groups(batches, num_experts)
        assert [batch for group in groups for batch in group] == batches
        sizes.append(max(map(len, groups)))
    assert sizes == [64, 10, 1]

"""Batches are identified in tasks that are worth a process and fit one."""

from moe_ray.orchestration.jobs.identify import _groups


def test_every_batch_is_in_one_task_and_a_larger_model_makes_smaller_tasks():
    batches = list(range(100, 250))
    sizes = []
    for num_experts in (48, 20_000, 1_000_000):
        groups = _groups(batches, num_experts)
        assert [batch for group in groups for batch in group] == batches
        sizes.append(max(map(len, groups)))
    assert sizes == [64, 10, 1]

"""A pool of model processes that is this process: what a job's actors do, without Ray."""

from __future__ import annotations

from contextlib import contextmanager

from moe_ray.orchestration.cluster.model_process import ModelHolder


class InProcessPool:
    """Takes the place of a `ModelPool`.

    Attributes:
        jobs: those that were worked on, in order.
    """

    seconds_waited = 0.0

    def __init__(self, model, tokenizer):
        self.holder = object.__new__(ModelHolder)
        self.holder.model, self.holder.tokenizer = model, tokenizer
        self.jobs = []

    @contextmanager
    def working(self, blocks, kind, job, **options):
        self.jobs.append(job)
        work = kind(self.holder, job)
        with work.in_force():
            yield map(work, blocks)

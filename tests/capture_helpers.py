"""Actors with accidents, a driver to kill, and stored batches of mixed lengths; shipped to Ray's workers by value."""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from counting_alone import count_batches

from moe_ray.config.capture import CaptureConfig
from moe_ray.config.cluster import ClusterConfig
from moe_ray.config.model import ModelConfig
from moe_ray.models.loading import load_model, load_tokenizer
from moe_ray.orchestration.cluster.ray_session import ray_session
from moe_ray.orchestration.jobs.capture import capture
from moe_ray.orchestration.jobs.capture_actor import CaptureActor
from moe_ray.prompts.example_tables import BATCHES, ROWS_PER_GROUP, frame_to_batches
from moe_ray.run_directory import RunDirectory
from moe_ray.storage.folder import Folder

WORDS = [
    "the",
    "a",
    "bread",
    "water",
    "plant",
    "summer",
    "garden",
    "how do I",
    "make",
    "grow",
    "tell me about",
    "please",
]
DEADLY = "this one ends the process"


def write_batches(folder, num_batches, *, changes=()):
    """Stored batches of 2 + 2 examples of mixed lengths; `changes` are (row, columns) to replace."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(4 * num_batches):
        content = " ".join(rng.choice(WORDS, size=int(rng.lognormal(2.5, 0.9)) + 1))
        rows.append(
            {
                "batch_idx": index // 4,
                "in_batch_idx": index % 4,
                "id": f"row{index}",
                "label": "safe" if index % 4 < 2 else "unsafe",
                "category": "",
                "messages": json.dumps([{"role": "user", "content": content}]),
                "response": "I can help with that." if index % 3 == 0 else None,
                "target": "No.",
                "target_complete": True,
                "pair": None,
                "split": "train",
            }
        )
    for row, columns in changes:
        rows[row] |= columns
    Folder.open(str(folder)).write_table(BATCHES, pd.DataFrame(rows), row_group_size=ROWS_PER_GROUP)
    return pd.DataFrame(rows)


def message(content, role="user"):
    return {"messages": json.dumps([{"role": role, "content": content}])}


def counts_of_core(frame, model, **options):
    """The counts of the examples, as one process without Ray counts them."""
    return count_batches(
        load_model(model, device="cpu"), load_tokenizer(model), frame_to_batches(frame), rows_per_forward=3, **options
    )


class ActorWithLittleMemory(CaptureActor):
    """Has room for 256 tokens in a forward pass, and dies whenever it sees one certain example."""

    def forward(self, examples, rows):
        if any(DEADLY in example["messages"] for example in examples):
            os._exit(1)
        if len(rows) * max(len(row.prompt_ids) + len(row.answer_ids) for row in rows) > 256:
            raise torch.OutOfMemoryError("tried to allocate more than there is")
        return super().forward(examples, rows)


@dataclass(frozen=True)
class Once:
    """True the first time that any process asks."""

    marker: Path

    def __call__(self):
        try:
            self.marker.touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


class ActorThatDiesOnce(CaptureActor):
    """Ends its process after some forward passes, the first time that any actor gets there."""

    def forward(self, examples, rows):
        self.forwards = getattr(self, "forwards", 0) + 1
        if self.forwards == 3 and Once(Path(self.attempts.path).parent / "died")():
            os._exit(1)
        return super().forward(examples, rows)


class SlowActor(CaptureActor):
    """Leaves time to kill whoever waits for it."""

    def forward(self, examples, rows):
        time.sleep(0.3)
        return super().forward(examples, rows)


def main():
    """A driver: address, model, run directory."""
    address, model, run = sys.argv[1:]
    with ray_session(ClusterConfig(address=address)):
        capture(
            RunDirectory.open(run),
            ModelConfig(path=model),
            CaptureConfig(generate=False, tokens_per_forward=256),
            actor=SlowActor,
            seconds_per_part=0.0,
        )


if __name__ == "__main__":
    main()

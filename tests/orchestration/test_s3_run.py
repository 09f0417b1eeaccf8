"""A whole workflow whose run directory is in S3, killed and gone on with: the results of an uninterrupted run on a disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from paths import ROOT
from s3_server import BUCKET, S3Server

from moe_ray.finetuning.adapter_files import TENSORS
from moe_ray.finetuning.history import read_history
from moe_ray.run_directory import FINETUNE, open_run
from moe_ray.storage.folder import Folder
from moe_ray.storage.lock import LOCK

pytestmark = [
    *(pytest.mark.needs_ray, pytest.mark.own_ray, pytest.mark.slow, pytest.mark.exhaustive),
    pytest.mark.filterwarnings("default"),
]

KILLED_AT = ("capture/inputs.json", "capture/counts/part-", "finetune/inputs.json", "evaluate/after/answers/")
"""The driver is killed when a file whose name begins so is there."""
_SECONDS = 900.0


@pytest.fixture(scope="module")
def server():
    with S3Server() as server:
        yield server


def started(run_dir: str, model: Path, tracking: Path) -> subprocess.Popen[bytes]:
    """The driver of a small run, with a Ray of its own."""
    settings = [
        *(f"model.path={model}", f"tracking.uri=sqlite:///{tracking}", "prompts.max_batches=3"),
        *("prompts.max_test_examples=4", "evaluate.max_new_tokens=6", "identify.permutations=50"),
        *("identify.resamples=0", "finetune.epochs=1", "ablate.run=false"),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-m", "moe_ray", "full", run_dir, *settings],
        env=environment | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finished(driver: subprocess.Popen[bytes]) -> str:
    _, said = driver.communicate(timeout=_SECONDS)
    assert driver.returncode == 0, said.decode()[-3000:]
    return said.decode()


def kill_when_there(driver: subprocess.Popen[bytes], folder: Folder, prefix: str) -> bool:
    """Whether the driver was killed before it had ended."""
    deadline = time.monotonic() + _SECONDS
    while driver.poll() is None and not any(name.startswith(prefix) for name in folder.files()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    return driver.returncode == -signal.SIGKILL


def test_a_run_in_a_store_that_is_killed_again_and_again_ends_as_one_on_a_disk(server, tiny_model_path, tmp_path):
    finished(started(str(tmp_path / "run"), tiny_model_path, tmp_path / "whole.db"))
    url = f"s3://{BUCKET}/runs/killed"
    folder = Folder.open(url)
    kills = [
        kill_when_there(started(url, tiny_model_path, tmp_path / "killed.db"), folder, prefix) for prefix in KILLED_AT
    ]
    assert kills == [True] * len(KILLED_AT)
    # The next driver does not wait for the lock of one that is gone.
    said = finished(started(url, tiny_model_path, tmp_path / "killed.db"))
    assert "resuming" in said or "reused" in said
    whole, killed = open_run(str(tmp_path / "run")), open_run(url)
    assert killed.stages == whole.stages
    assert np.array_equal(killed.counts.counts_NLE, whole.counts.counts_NLE)
    assert killed.masks.digest() == whole.masks.digest()
    learned = [run.learned_experts.read_bytes(TENSORS) for run in (whole, killed)]
    assert learned[0] == learned[1]
    losses = [[step["loss"] for step in read_history(run.sub(FINETUNE))] for run in (whole, killed)]
    assert losses[0] == losses[1]
    for when in ("before", "after"):
        assert killed.answers(when)["answer"].tolist() == whole.answers(when)["answer"].tolist()
    assert not [name for name in folder.files() if name.endswith(".part") or name == LOCK]
    assert finished(started(url, tiny_model_path, tmp_path / "killed.db")).count("reused from an earlier run") >= 5

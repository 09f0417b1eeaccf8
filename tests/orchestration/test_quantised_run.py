"""The whole workflow over experts that are codes, and that what it learned belongs to them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from workflow import run_workflow

from moe_ray.config.model import ModelConfig
from moe_ray.errors import InputError
from moe_ray.finetuning.adapter import adapter_applied
from moe_ray.finetuning.adapter_files import read_adapter_header
from moe_ray.models.loading import load_model
from moe_ray.routing.count_store import read_counts
from moe_ray.storage.folder import Folder

pytestmark = [pytest.mark.needs_ray, pytest.mark.slow, pytest.mark.filterwarnings("default")]

MOST_CHOICES_MOVED = {"int8": 0.02, "4bit": 0.15}
"""Share of all choices of experts that may be others than the plain model's."""


@pytest.mark.parametrize("method", ["int8", "4bit"])
def test_every_stage_runs_over_codes(ray_cluster, tiny_model_path, tmp_path, method):
    if method == "4bit":
        pytest.importorskip("bitsandbytes", reason="moe-ray[quantised] is not installed")
    run_dir = tmp_path / "run"
    settings = [
        f"model.path={tiny_model_path}",
        "prompts.max_batches=2",
        "prompts.max_test_examples=4",
        "finetune.epochs=1",
        "finetune.learning_rate=3e-3",
        "evaluate.max_new_tokens=8",
    ]
    assert run_workflow("full", [f"run_dir={run_dir}", *settings, f"model.quantisation={method}"]) == 0
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["frozen_parameters_changed"] == 0
    assert summary["change"]["target_loss"]["value"] < 0
    assert f"with experts in {method}" in json.loads((run_dir / "resources.json").read_text())["decided"]

    assert run_workflow("capture", [f"run_dir={tmp_path / 'plain'}", *settings]) == 0
    over_codes, plain = (
        read_counts(Folder.open(str(folder / "capture" / "counts"))).counts_NLE.astype(int)
        for folder in (run_dir, tmp_path / "plain")
    )
    moved = np.abs(over_codes - plain).sum() / 2 / plain.sum()
    assert 0 < moved < MOST_CHOICES_MOVED[method]

    adapter = run_dir / "finetune"
    assert read_adapter_header(adapter)["quantisation"] == method
    ids = torch.arange(3, 20).unsqueeze(0)
    model = load_model(ModelConfig(path=str(tiny_model_path), quantisation=method), device="cpu")
    with torch.inference_mode():
        before = model(ids).logits
        with adapter_applied(model, adapter):
            assert not torch.equal(model(ids).logits, before)
        assert torch.equal(model(ids).logits, before)
    with (
        pytest.raises(InputError, match=f"quantised as {method}"),
        adapter_applied(load_model(ModelConfig(path=str(tiny_model_path)), device="cpu"), adapter),
    ):
        pass

"""Settings of small runs that sweep, go in rounds and compare, and what such a run left where."""

from __future__ import annotations

SPACE = "sweep.space={identify.threshold: [0.05, 0.99], identify.top_k: [6, 12]}"
LOSS_TOLERANCE = 1e-4
"""Nats per token; another process may split sums otherwise."""


def settings(tiny_model_path, run_dir, *more):
    return [
        f"run_dir={run_dir}",
        f"model.path={tiny_model_path}",
        "prompts.max_batches=3",
        "prompts.max_test_examples=6",
        "finetune.epochs=1",
        "finetune.learning_rate=3e-3",
        "finetune.num_workers=0",
        "evaluate.max_new_tokens=12",
        # A threshold of 0.99 selects nothing where tokens are counted as they are.
        "identify.roles=[prompt]",
        "identify.weighting=tokens",
        "identify.permutations=100",
        "identify.resamples=0",
        *more,
    ]


def study(tiny_model_path, run_dir, *more):
    return settings(
        tiny_model_path,
        run_dir,
        "sweep.run=true",
        SPACE,
        "rounds.max_rounds=2",
        "rounds.target=1.0",
        "rounds.action=identify",
        "compare.run=true",
        "compare.names=[policy:masked,random,full,lora_same,mask_only]",
        "compare.draws=1",
        *more,
    )


def modified(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


def must_not_be_called(*args, **kwargs):
    raise AssertionError("captured again")

"""Distributed answering: Ray Data actors generate, judge and score, for evaluation and for missing targets."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import ray
import ray.data

from moe_ray.answering import generate_answers, target_losses
from moe_ray.chat import TokenizedRow, encode_answer, encode_prompt, pad_token_id
from moe_ray.config import EvaluateConfig, ModelConfig
from moe_ray.judges import is_refusal
from moe_ray.orchestration.actors import ModelHolder
from moe_ray.orchestration.cluster import require_cpus
from moe_ray.orchestration.progress import progress

_COLUMNS = ["id", "label", "category", "messages", "target", "target_complete"]


class AnswerActor:
    """Answers prompts greedily under natural routing, and scores their target responses."""

    def __init__(self, model: ModelConfig, config: EvaluateConfig, max_new_tokens: int, adapter: str | None) -> None:
        self.holder = ModelHolder(model, config.num_actors, adapter)
        self.config, self.max_new_tokens = config, max_new_tokens

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """Adds `answer`, `ended`, `refused`, `target_loss` (summed nats) and `target_tokens` to a block."""
        model, tokenizer, size = self.holder.model, self.holder.tokenizer, self.config.rows_per_forward
        prompts = [encode_prompt(tokenizer, json.loads(text)) for text in batch["messages"]]
        answers = generate_answers(model, tokenizer, prompts, max_new_tokens=self.max_new_tokens, rows_per_forward=size)
        targets = [
            encode_answer(tokenizer, text, complete=bool(complete)) if isinstance(text, str) and text else []
            for text, complete in zip(batch["target"], batch["target_complete"], strict=True)
        ]
        scored = [index for index, ids in enumerate(targets) if ids]
        losses = np.zeros(len(prompts))
        losses[scored] = target_losses(
            model,
            [TokenizedRow(prompts[index], targets[index]) for index in scored],
            rows_per_forward=size,
            pad_id=pad_token_id(tokenizer),
        )
        return {
            **{name: batch[name] for name in _COLUMNS},
            "answer": np.array([text for text, _ in answers], dtype=object),
            "ended": np.array([ended for _, ended in answers]),
            "refused": np.array([is_refusal(text) for text, _ in answers]),
            "target_loss": losses,
            "target_tokens": np.array([len(ids) for ids in targets]),
        }


def answer(
    examples: pd.DataFrame,
    model: ModelConfig,
    config: EvaluateConfig,
    *,
    what: str,
    adapter: str | None = None,
    max_new_tokens: int | None = None,
) -> pd.DataFrame:
    """Answers, verdicts and target losses of the examples, in their order.

    Args:
        examples: rows with `id, label, category, messages, target, target_complete`.
        model: which model.
        config: actors and sizes.
        what: what this is, for the progress bar.
        adapter: folder of learned experts; None = the base model.
        max_new_tokens: None = the configuration's.
    """
    require_cpus(config.num_actors + 1, "evaluation")
    table = pa.Table.from_pandas(examples[_COLUMNS].astype({"target": "string"}), preserve_index=False)
    size = config.rows_per_forward
    blocks = [table.slice(start, size) for start in range(0, len(table), size)]
    results = ray.data.from_arrow(blocks).map_batches(
        AnswerActor,
        fn_constructor_args=(model, config, max_new_tokens or config.max_new_tokens, adapter),
        compute=ray.data.ActorPoolStrategy(size=config.num_actors),
        batch_size=size,
        batch_format="numpy",
        num_gpus=config.gpus_per_actor or None,
    )
    parts = []
    with progress(what, len(examples)) as meter:
        for block in results.iter_batches(batch_size=None, batch_format="numpy"):
            parts.append(pd.DataFrame(block))
            meter.advance(len(parts[-1]))
    answers = pd.concat(parts, ignore_index=True)
    return answers.set_index("id").loc[examples["id"]].reset_index()

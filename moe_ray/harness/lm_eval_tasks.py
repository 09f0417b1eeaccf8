"""Tasks of lm-eval on a model in memory: `HFLM(pretrained=model)`, with the scores of every sample.

lm-eval: Gao et al., "A framework for few-shot language model evaluation", https://github.com/EleutherAI/lm-evaluation-harness.
"""

from __future__ import annotations

import contextlib
import io
import logging
from typing import Any

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_ray.config.harness import HarnessConfig
from moe_ray.errors import InputError
from moe_ray.harness.extra import imported
from moe_ray.harness.scores import plain_number, score_table
from moe_ray.harness.tasks import HarnessTask

_SEED = 0


def lm_eval_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: HarnessTask, config: HarnessConfig
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """The scores of every sample, and the samples as lm-eval logs them.

    Args:
        model: in memory, in eval mode; its weights are used as they are now.
        tokenizer: its tokenizer.
        task: of lm-eval.
        config: limits and form of the questions.

    Returns:
        a table with `COLUMNS`; and a mapping per sample with `task`, `sample`, `filter`, `arguments`, `resps` and `target`.

    Raises:
        InputError: there is no such task, or none of its metrics is a number per sample.
    """
    evaluator, huggingface, tasks = (
        imported(f"lm_eval.{name}") for name in ("evaluator", "models.huggingface", "tasks")
    )
    for name in ("lm-eval", "lm_eval"):  # a line for every task, and warnings about what is meant here
        logging.getLogger(name).setLevel(logging.ERROR)
    manager = tasks.TaskManager(include_defaults=task.file is None)
    if task.file is None and task.name not in manager.all_tasks:
        raise InputError(
            f"harness.lm_eval: lm-eval has no task {task.name!r}; see `lm-eval ls tasks`, or give a YAML file"
        )
    wrapped = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=config.batch_size)
    with contextlib.redirect_stderr(io.StringIO()):  # bars of its own, between which nobody would see the stage's
        results = evaluator.simple_evaluate(
            model=wrapped,
            tasks=[task.name],
            num_fewshot=None if config.fewshot < 0 else config.fewshot,
            limit=config.limit or None,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=config.chat_template,
            task_manager=manager,
            random_seed=_SEED,
            numpy_random_seed=_SEED,
            torch_random_seed=_SEED,
            fewshot_random_seed=_SEED,
        )
    rows, logged = [], []
    for name, samples in results["samples"].items():
        title = task.title if task.file is not None and len(results["samples"]) == 1 else str(name)
        for sample in samples:
            form = "" if sample["filter"] == "none" else f" ({sample['filter']})"
            for metric in sample["metrics"]:
                value = plain_number(sample[metric])
                if value is not None:
                    rows.append(
                        {"task": title, "metric": f"{metric}{form}", "sample": sample["doc_id"], "value": value}
                    )
            logged.append(
                {"task": title, "sample": str(sample["doc_id"])}
                | {key: _plain(sample[key]) for key in ("filter", "arguments", "resps", "target")}
            )
    if not rows:
        raise InputError(f"harness.lm_eval: {task.name}: no metric is a number for every sample; choose another task")
    return score_table(rows), logged


def _plain(value: Any) -> Any:
    """What JSON can hold."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)

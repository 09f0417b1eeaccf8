"""Tasks of inspect_ai on a model in memory, through a model provider of ours.

inspect_ai: UK AI Security Institute, https://inspect.aisi.org.uk. A provider gets what can be written into a log, so models
are handed over by name: `served` says which one a name stands for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_ray.config.harness import HarnessConfig
from moe_ray.errors import InputError
from moe_ray.harness.extra import imported
from moe_ray.harness.scores import plain_number, score_table
from moe_ray.harness.tasks import HarnessTask
from moe_ray.models.generation import generate_responses
from moe_ray.models.tokenization import encode_prompt

PROVIDER = "moe_ray"

_SERVED: dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]] = {}


@contextmanager
def served(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[Any]:
    """An inspect_ai `Model` that answers with a model in memory; it answers in this context only.

    Args:
        name: what logs call it.
        model: in eval mode.
        tokenizer: its tokenizer.
    """
    provider = _provider()
    inspect_model = imported("inspect_ai.model")
    _SERVED[name] = (model, tokenizer)
    try:
        yield inspect_model.Model(provider(model_name=name), inspect_model.GenerateConfig())
    finally:
        del _SERVED[name]


@cache
def _provider() -> Any:
    inspect_model = imported("inspect_ai.model")

    class InMemory(inspect_model.ModelAPI):  # type: ignore[misc, name-defined]
        """Answers one conversation at a time, greedily where no temperature is set."""

        async def generate(self, input: Any, tools: Any, tool_choice: Any, config: Any) -> Any:
            if tools:
                raise InputError(
                    "harness.inspect: the task gives the model tools, which moe-ray's provider does not know"
                )
            model, tokenizer = _SERVED[self.model_name]
            messages = [{"role": message.role, "content": message.text} for message in input]
            (answer,) = generate_responses(
                model,
                tokenizer,
                [encode_prompt(tokenizer, messages)],
                max_new_tokens=config.max_tokens or HarnessConfig().max_new_tokens,
                temperature=config.temperature or 0.0,
                seeds=[config.seed or 0],
            )
            reason = "stop" if answer.ended else "max_tokens"
            return inspect_model.ModelOutput.from_content(self.model_name, answer.text, stop_reason=reason)

        def max_connections(self) -> int:
            """One at a time: the model is one."""
            return 1

    return inspect_model.modelapi(name=PROVIDER)(InMemory)


def task_in_file(task: HarnessTask) -> Any:
    """The inspect_ai `Task` that a file's decorated function gives; the file is run.

    Raises:
        InputError: the file has no such task, or several and none is named.
    """
    assert task.file is not None, task
    spec = spec_from_file_location(f"moe_ray_task_{task.file.stem}", task.file)
    assert spec is not None, task.file
    assert spec.loader is not None, task.file
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    known = {name: value for name, value in vars(module).items() if _is_task(value)}
    wanted = task.name.partition("@")[2] or (next(iter(known)) if len(known) == 1 else "")
    if wanted not in known:
        raise InputError(
            f"harness.inspect: {task.name}: got tasks {sorted(known)} in it, expected one, or one of them named as "
            "FILE.py@TASK"
        )
    return known[wanted]()


def _is_task(value: Any) -> bool:
    return getattr(getattr(value, "__registry_info__", None), "type", None) == "task"


def inspect_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: HarnessTask,
    config: HarnessConfig,
    *,
    name: str,
) -> tuple[pd.DataFrame, bytes]:
    """The scores of every sample, and the task's `.eval` log, which `inspect view` opens.

    Args:
        model: in memory, in eval mode; its weights are used as they are now.
        tokenizer: its tokenizer.
        task: of inspect_ai.
        config: `limit` and `max_new_tokens`.
        name: of the model, for the log.

    Raises:
        InputError: the task failed, or no score of it is a number for every sample.
    """
    inspect_ai, log, scorer = (imported(f"inspect_ai{name}") for name in ("", ".log", ".scorer"))
    as_number = scorer.value_to_float()
    with TemporaryDirectory() as folder, served(name, model, tokenizer) as served_model:
        (done,) = inspect_ai.eval(
            task.name if task.file is None else task_in_file(task),
            model=served_model,
            limit=config.limit or None,
            max_tokens=config.max_new_tokens,
            max_connections=1,
            log_dir=folder,
            log_format="eval",
            display="none",
        )
        if done.status != "success":
            said = done.error.message if done.error is not None else done.status
            raise InputError(f"harness.inspect: {task.name} ended with: {said}; mend the task")
        done = log.read_eval_log(done.location)
        data = Path(done.location).read_bytes()
    rows = []
    for sample in done.samples or ():
        for metric, score in (sample.scores or {}).items():
            value = plain_number(as_number(score.value))
            if value is not None:
                place = {"task": task.title, "metric": metric, "sample": f"{sample.id}/{sample.epoch}"}
                rows.append(place | {"value": value})
    if not rows:
        raise InputError(f"harness.inspect: {task.name}: no score is a number; choose another task")
    return score_table(rows), data

"""`moe-ray plan`: what a run would do and take, without Ray and without loading the model; nothing is written."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pandas as pd

from moe_ray.config.fields import EMBEDDED
from moe_ray.config.run import Config
from moe_ray.config.shards import check_shards
from moe_ray.errors import InputError
from moe_ray.evaluation.target_check import refuse_complying_targets, refuse_targets_without_answer
from moe_ray.orchestration.inputs import check_requests, model_size, resolve_model, warn_of_embedded_prompts
from moe_ray.prompts.prompt_set import Prompts, read_prompts
from moe_ray.prompts.spooled_examples import index_of, pick
from moe_ray.report.terminal import print_table
from moe_ray.resources.decide import Decision, decide
from moe_ray.resources.fitting import RESERVED
from moe_ray.resources.model_size import ModelSize
from moe_ray.resources.nodes import GB, Node, this_machine
from moe_ray.resources.process_memory import largest_union, process_memory

_CHARACTERS_PER_TOKEN = 4
_READ_FOR_LENGTH = 500
_FORWARDS_OF_A_STEP = 3
"""A backward pass takes about twice as long as its forward pass."""


def run(arguments: argparse.Namespace) -> None:
    """Prints the plan of a run with `settings`.

    Raises:
        InputError: what a run would refuse before it starts.
    """
    print_plan(arguments.settings, measures=arguments.measure)


@dataclass(frozen=True, kw_only=True)
class _Work:
    """Tokens and passes of a run, about."""

    capture_tokens: int
    row_tokens: int
    trained_tokens: int
    steps: int
    answers: int
    answer_tokens: int


def print_plan(config: Config, *, measures: bool = False, machine: Node | None = None) -> None:
    """Prints examples, memory, passes and, where the model is loaded for it, time.

    Args:
        config: the settings.
        measures: load the model, and time one batch.
        machine: None = this one.

    Raises:
        InputError: what a run would refuse before it starts, but for targets that comply, of which it warns.
    """
    prompts = read_prompts(config)
    check_requests(config)
    check_shards(config, trains=True)
    resolve_model(config, trained=True)
    size = model_size(config)
    machine = this_machine() if machine is None else machine
    decision = decide(config, size, [machine])
    work = _work_of(prompts, config)
    _print_prompts(prompts)
    _print_memory(decision, size, machine, num_batches=len(prompts.batches), work=work)
    speed = _measured(decision.config, prompts, work) if measures else None
    _print_passes(decision.config, work, speed)
    for warning in _warnings(config, prompts, decision):
        print(f"warning: {warning}")
    warn_of_embedded_prompts(config)


def _work_of(prompts: Prompts, config: Config) -> _Work:
    num_examples = sum(len(batch.examples) for batch in prompts.batches[:1]) * len(prompts.batches)
    positions = np.unique(np.linspace(0, len(prompts.examples) - 1, _READ_FOR_LENGTH).astype(np.int32))
    prompt_lengths, target_lengths = [], []
    for example in pick(prompts.examples, positions):
        text = sum(len(str(message["content"])) for message in example.messages)
        prompt_lengths.append(text // _CHARACTERS_PER_TOKEN + 1)
        answer = example.target or config.prompts.refusal
        target_lengths.append(len(answer) // _CHARACTERS_PER_TOKEN + 1)
    mean = float(np.mean(prompt_lengths))
    generated = config.capture.max_new_tokens if config.capture.generate else 0
    settings = config.finetune
    of_a_step = settings.batches_per_step or max(1, settings.num_workers)
    held_out = len(prompts.test)
    return _Work(
        capture_tokens=int(num_examples * (mean + generated)),
        row_tokens=max(prompt_lengths) + max(target_lengths),
        trained_tokens=int(num_examples * (mean + float(np.mean(target_lengths))) * settings.epochs),
        steps=-(-len(prompts.batches) // of_a_step) * settings.epochs,
        answers=2 * held_out * len(config.evaluate.routing),
        answer_tokens=config.evaluate.max_new_tokens,
    )


def _print_prompts(prompts: Prompts) -> None:
    index = index_of(prompts.examples)
    used = Counter(str(category) for category in getattr(prompts.batches, "categories", ()))
    rows = []
    for number, name in enumerate(index.categories):
        of_category = index.category == number
        if of_category.any():
            unsafe = int((of_category & index.is_unsafe).sum())
            rows.append((name or "(none)", str(int(of_category.sum()) - unsafe), str(unsafe), str(used.get(name, 0))))
    unsafe = int(index.is_unsafe.sum())
    rows.append(("all", str(len(index) - unsafe), str(unsafe), str(len(prompts.batches))))
    print_table(
        "Prompts",
        pd.DataFrame(rows, columns=["category", "safe", "unsafe", "batches"]),
        caption=(
            f"{len(prompts.assembly.left_over)} training examples fill no batch; held out: {len(prompts.test)} for the "
            f"figures, {len(prompts.validation)} for validation"
        ),
    )


def _print_memory(decision: Decision, size: ModelSize, machine: Node, *, num_batches: int, work: _Work) -> None:
    config = decision.config
    most = min(size.experts, config.identify.top_k * num_batches)
    unions = sorted({min(size.experts, config.identify.top_k), most})
    rows = [
        process
        for union in unions
        for process in process_memory(size, config, union=union, row_tokens=work.row_tokens)
        if union == unions[0] or process.learned
    ]
    if decision.gpus_per_copy and machine.gpu_memory:
        gpus = 1 if config.model.num_shards > 1 else decision.gpus_per_copy
        room, where = gpus * machine.gpu_memory, f"GPUs of a process ({gpus})"
    else:
        room, where = machine.memory - RESERVED, "this machine, less what libraries take"
    cells = [
        (
            row.what,
            f"{row.weights / GB:.1f}",
            f"{row.learned / GB:.1f}",
            f"{row.activations / GB:.1f}",
            f"{row.total / GB:.1f}",
            "yes" if row.total <= room else "no",
        )
        for row in rows
    ]
    columns = ["process", "weights, GB", "learned, GB", "activations, about GB", "all, GB", "fits"]
    print_table(
        "Memory of one process",
        pd.DataFrame(cells, columns=columns),
        caption=(
            f"{decision.in_words}\n{room / GB:.1f} GB in {where}; a training of up to "
            f"{largest_union(size, config, room)} of {size.experts} experts has room"
        ),
    )


def _print_passes(config: Config, work: _Work, speed: dict[str, float] | None) -> None:
    tokens = {
        "capture": (work.capture_tokens, f"{-(-work.capture_tokens // config.capture.tokens_per_forward)} passes"),
        "fine-tuning": (work.trained_tokens, f"{work.steps} steps"),
        "answers, before and after": (work.answers * work.answer_tokens, f"{work.answers} answers"),
    }
    rows = []
    for name, (number, passes) in tokens.items():
        seconds = ""
        if speed is not None:
            per_second = speed["generated" if name.startswith("answers") else "read"]
            share = _FORWARDS_OF_A_STEP if name == "fine-tuning" else 1
            processes = int(config.capture.num_actors) if name != "fine-tuning" else max(1, config.finetune.num_workers)
            seconds = f"{number * share / per_second / processes:.0f}"
        rows.append((name, f"{number:,}", passes, seconds or "–"))
    caption = "tokens are estimated at four characters each"
    if speed is not None:
        caption += (
            f"; measured here: {speed['loading']:.0f} s to load the model, {speed['read']:.0f} tokens read and "
            f"{speed['generated']:.0f} generated a second"
        )
    else:
        caption += "; --measure loads the model and says how long it takes"
    print_table("Work", pd.DataFrame(rows, columns=["stage", "tokens", "in", "seconds"]), caption=caption)


def _measured(config: Config, prompts: Prompts, work: _Work) -> dict[str, float]:
    """Seconds to load the model, and tokens that it reads and generates a second, on one batch."""
    import torch

    from moe_ray import pipeline
    from moe_ray.models.generation import generate_answers
    from moe_ray.models.loading import load_model, load_tokenizer
    from moe_ray.models.token_budget import TokenBudget
    from moe_ray.models.tokenization import encode_prompt

    if config.model.path == EMBEDDED:
        raise InputError("--measure: got the embedded model, which is built by a run; give model.path")
    if config.model.num_shards > 1:
        raise InputError(
            f"--measure: got model.num_shards={config.model.num_shards}, expected 1, as one process measures; leave it out"
        )
    began = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() and config.capture.gpus_per_actor else "cpu"
    model, tokenizer = load_model(config.model, device=device), load_tokenizer(config.model)
    loaded = time.perf_counter()
    counts = pipeline.capture(
        model, tokenizer, prompts.batches[:1], config=config.capture, identify_config=config.identify
    )
    read = time.perf_counter()
    rows = [encode_prompt(tokenizer, example.messages) for example in prompts.batches[0].examples]
    budget = TokenBudget(config.evaluate.tokens_per_forward)
    answers = generate_answers(model, tokenizer, rows, max_new_tokens=work.answer_tokens, budget=budget)
    ended = time.perf_counter()
    generated = sum(len(answer.ids) for answer in answers)
    return {
        "loading": loaded - began,
        "read": float(counts.num_tokens.sum()) / (read - loaded),
        "generated": max(1, generated) / (ended - read),
    }


def _warnings(config: Config, prompts: Prompts, decision: Decision) -> list[str]:
    found = list(decision.warnings)
    checks = [refuse_targets_without_answer]
    checks += [refuse_complying_targets] * (not config.prompts.allow_complying_targets)
    for refuse in checks:
        try:
            refuse(prompts.examples)
        except InputError as error:
            found.append(str(error))
    if config.cluster.address:
        found.append(
            f"cluster.address: this plan is of this machine; {config.cluster.address} is not asked, and may have more"
        )
    return found

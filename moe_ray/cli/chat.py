"""`moe-ray chat` and `moe-ray steer`: a prompt answered twice, side by side, by two states of one model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_ray.config.model import ModelConfig
from moe_ray.finetuning.adapter import adapter_applied
from moe_ray.finetuning.adapter_files import local_adapter, read_adapter_header
from moe_ray.models.generation import generate_responses
from moe_ray.models.loading import load_model, load_tokenizer
from moe_ray.models.tokenization import encode_prompt
from moe_ray.report.terminal import print_table
from moe_ray.routing.steering import read_steering, steered
from moe_ray.run_directory import open_run

State = Callable[[PreTrainedModel], AbstractContextManager[object]]
"""Puts a model into a state, and back."""


def run(arguments: argparse.Namespace) -> None:
    """Answers each line of the input, or each prompt given, before and after the repair, or unsteered and steered.

    Raises:
        InputError: the run has no learned experts, or a file or model is not what it should be.
    """
    if arguments.command == "steer":
        plan = read_steering(arguments.file)
        _answer_all(
            ModelConfig(path=arguments.model, dtype=arguments.dtype),
            {"as it is": lambda _: nullcontext(), plan.manner: lambda model: steered(model, plan)},
            arguments,
        )
        return
    learned = open_run(arguments.run_dir).learned_experts
    with local_adapter(learned) as adapter:
        base = arguments.base or str(read_adapter_header(learned)["base"])
        _answer_all(
            ModelConfig(path=base, dtype=arguments.dtype),
            {"before": lambda _: nullcontext(), "after": lambda model: adapter_applied(model, adapter)},
            arguments,
        )


def _answer_all(config: ModelConfig, states: dict[str, State], arguments: argparse.Namespace) -> None:
    model, tokenizer = load_model(config), load_tokenizer(config)
    for prompt in arguments.prompt or _lines():
        answers = answers_of(model, tokenizer, prompt, states.values(), max_new_tokens=arguments.max_new_tokens)
        print_table(prompt, pd.DataFrame([answers], columns=list(states)))


def answers_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    states: Iterable[State],
    *,
    max_new_tokens: int,
) -> list[str]:
    """The model's greedy answer to a prompt in each state, one after the other.

    Args:
        model: in eval mode.
        tokenizer: its tokenizer.
        prompt: what the user says.
        states: each puts the model into a state and back.
        max_new_tokens: an answer's greatest length in tokens.
    """
    ids = encode_prompt(tokenizer, [{"role": "user", "content": prompt}])
    answers = []
    for state in states:
        with state(model):
            (response,) = generate_responses(model, tokenizer, [ids], max_new_tokens=max_new_tokens)
        answers.append(response.text if response.ended else f"{response.text} …")
    return answers


def _lines() -> Iterator[str]:
    """What is typed, line by line, until the input ends; empty lines are passed over."""
    is_typed = sys.stdin.isatty()
    while True:
        if is_typed:
            print("\n> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()

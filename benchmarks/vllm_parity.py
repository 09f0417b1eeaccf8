"""vLLM beside transformers on one model and the same token ids: how far their routes agree, and how fast each is.

    python benchmarks/vllm_parity.py MODEL [--number 64] [--new-tokens 64] [--gpus 1] [--dtype bfloat16]

MODEL is a checkpoint folder or a hub name. Needs vLLM (`pip install 'moe-ray[vllm]'`). Prompts are the demo's. Prints the
agreement, which `capture.min_parity` is about, and a table of tokens a second; loading is not part of the times.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from moe_ray.config.model import ModelConfig
from moe_ray.demo.examples import embedded_records
from moe_ray.models.end_tokens import end_ids
from moe_ray.models.generation import generate_answers
from moe_ray.models.loading import load_model, load_tokenizer
from moe_ray.models.token_budget import TokenBudget
from moe_ray.models.tokenization import TokenizedRow, encode_prompt, pad_token_id
from moe_ray.models.vllm_engine import VllmEngine
from moe_ray.prompts.examples import records_to_examples
from moe_ray.routing.capture import count_rows
from moe_ray.routing.counter import counting
from moe_ray.routing.counts import ROLES
from moe_ray.routing.engine_routes import RoutedModel, Routes, compare_routes, count_routes, read_routes

_BUDGET = 16_384


class Measured(NamedTuple):
    """What one of the two gave, and how long it took.

    Attributes:
        routes: (S, L, K) of each prompt.
        answers: token ids of each.
        counting: seconds for the routes.
        answering: seconds for the answers.
    """

    routes: list[Routes]
    answers: list[list[int]]
    counting: float
    answering: float


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What the work gives the second time, when everything is compiled and cached, and its seconds."""
    work()
    began = time.perf_counter()
    found = work()
    return found, time.perf_counter() - began


def by_transformers(
    config: ModelConfig, prompts: list[list[int]], new_tokens: int
) -> tuple[Measured, RoutedModel, list[int]]:
    """The prompts by transformers; what is known of the model; and its end tokens."""
    model, tokenizer = load_model(config), load_tokenizer(config)
    pad_id = pad_token_id(tokenizer)

    with counting(model, ids=True) as counter:

        def count() -> list[Routes]:
            found: list[Routes] = [np.empty(0, dtype=np.int64)] * len(prompts)

            def work(group: list[int]) -> list[Any]:
                count_rows(model, counter, [TokenizedRow(prompts[index], []) for index in group], pad_id=pad_id)
                assert counter.last_ids is not None
                return counter.last_ids[:: len(ROLES)]

            for group, ids in TokenBudget(_BUDGET).run_all([len(prompt) for prompt in prompts], work):
                for index, of_prompt in zip(group, ids, strict=True):
                    found[index] = of_prompt.astype(np.int64)
            return found

        routes, counting_seconds = timed(count)
        about = RoutedModel.of(counter.moe_layers, int(model.config.get_text_config().num_hidden_layers))
    answers, answering_seconds = timed(
        lambda: generate_answers(model, tokenizer, prompts, max_new_tokens=new_tokens, budget=TokenBudget(_BUDGET))
    )
    ends = end_ids(model, tokenizer)
    return Measured(routes, [answer.ids for answer in answers], counting_seconds, answering_seconds), about, ends


def by_vllm(
    config: ModelConfig, prompts: list[list[int]], new_tokens: int, about: RoutedModel, ends: list[int], gpus: float
) -> tuple[Measured, str]:
    """The prompts by vLLM, and its version."""
    engine = VllmEngine(config, gpus=gpus, returns_routes=True)
    recorded, counting_seconds = timed(lambda: engine.routes(prompts))
    routes = [
        read_routes(array, about, num_prompt_tokens=len(prompt))
        for array, prompt in zip(recorded, prompts, strict=True)
    ]
    answers, answering_seconds = timed(
        lambda: engine.generate(prompts, max_new_tokens=new_tokens, ends=ends, temperature=0.0)
    )
    return Measured(routes, answers, counting_seconds, answering_seconds), engine.version


def main() -> None:
    """Runs both, one after the other, and prints what is above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--number", type=int, default=64, help="prompts")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--gpus", type=float, default=float(torch.cuda.is_available()))
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--vllm-options", type=json.loads, default={}, help="JSON, as model.vllm_options")
    arguments = parser.parse_args()
    config = ModelConfig(path=arguments.model, dtype=arguments.dtype, vllm_options=arguments.vllm_options)
    tokenizer = load_tokenizer(config)
    examples = records_to_examples(embedded_records("train"))[: arguments.number]
    prompts = [encode_prompt(tokenizer, example.messages) for example in examples]
    own, about, ends = by_transformers(config, prompts, arguments.new_tokens)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # vLLM takes nine tenths of the GPU
    theirs, version = by_vllm(config, prompts, arguments.new_tokens, about, ends, arguments.gpus)

    parity = compare_routes(np.concatenate(theirs.routes), np.concatenate(own.routes), least=0.0)
    counts = [
        sum(count_routes(ids, about.num_experts) for ids in measured.routes).astype(np.int64)
        for measured in (own, theirs)
    ]
    moved = int(np.abs(counts[0] - counts[1]).sum()) // 2
    equal = sum(mine == other for mine, other in zip(own.answers, theirs.answers, strict=True))
    print(f"vLLM {version}, {arguments.dtype}, {len(prompts)} prompts of the demo")
    print(f"choices (tokens x MoE layers): {parity.num_choices}, the same set of experts: {parity.share_equal:.4%}")
    print(f"the same where one recording is moved by a token: {parity.share_shifted:.4%}")
    print(f"routed tokens that are counted for another expert: {moved} of {int(counts[0].sum())}")
    print(f"greedy answers equal: {equal} of {len(prompts)}")
    num_prompt = sum(map(len, prompts))
    print("\n| | prompt tokens a second, counted | new tokens a second |\n| --- | --- | --- |")
    for name, measured in (("transformers", own), ("vLLM", theirs)):
        new = sum(map(len, measured.answers))
        print(f"| {name} | {num_prompt / measured.counting:,.0f} | {new / measured.answering:,.0f} |")


if __name__ == "__main__":
    main()

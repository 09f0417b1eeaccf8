"""What answering held-out prompts costs: passes cut by a budget of tokens, and masks per row against one pass a mask.

    python benchmarks/generation.py
    python benchmarks/generation.py --turns 5 --budgets 1024 8192

All ways run in one process in turn (A B C … C B A), on the embedded model and its own held-out prompts; the least CPU time
of the turns is shown, which other processes on the machine move little with one thread. The ways of before are written out
here: natural answers in blocks of 32 rows in the order of arrival, and masked answers and losses with one pass, or one
`generate`, for each batch's mask. `padding` is the share of padding in what the model reads of prompts and targets; `equal`
says how many answers are those of the way of before, and for losses the largest difference in nats.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from moe_ray import pipeline
from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.config.model import ModelConfig
from moe_ray.demo.examples import embedded_records
from moe_ray.evaluation.answering_order import in_answering_order
from moe_ray.evaluation.evaluate import assign_reference_batches
from moe_ray.models.generation import generate_answers, generate_responses
from moe_ray.models.loading import load_model, load_tokenizer
from moe_ray.models.loss import target_losses
from moe_ray.models.token_budget import TokenBudget
from moe_ray.models.tokenization import TokenizedRow, encode_answer, encode_prompt, pad_token_id
from moe_ray.organisms import build_embedded
from moe_ray.prompts.batches import assemble_batches
from moe_ray.prompts.example_tables import batches_to_frame, examples_to_frame
from moe_ray.prompts.examples import records_to_examples
from moe_ray.routing.masking import route_rows_through, route_through

ROOT = Path(__file__).resolve().parents[1]
ROWS_BEFORE = 32


@dataclass(frozen=True)
class HeldOut:
    """The held-out prompts in the order of arrival, each with its target and the mask of its batch.

    Attributes:
        order: in which a run hands them out.
    """

    rows: list[TokenizedRow]
    batch_idx: list[int]
    masks: dict[int, Any]
    order: list[int]

    @property
    def prompts(self) -> list[list[int]]:
        """Their token ids."""
        return [row.prompt_ids for row in self.rows]

    def of_a_mask(self) -> Iterator[tuple[Any, list[int]]]:
        """Each mask with the rows of its batch."""
        for batch in dict.fromkeys(self.batch_idx):
            yield self.masks[batch], [row for row, other in enumerate(self.batch_idx) if other == batch]


class Passes:
    """The passes over the model's prompts, seen at the model."""

    def __init__(self, model: Any) -> None:
        self.shapes: list[tuple[int, int, int]] = []
        model.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, module: Any, args: Any, kwargs: Any) -> None:
        num_rows, length = kwargs["input_ids"].shape
        if length > 1:
            # A step of decoding has one position a row; a pass without padding may come without a mask.
            mask = kwargs.get("attention_mask")
            self.shapes.append((num_rows, length, num_rows * length if mask is None else int(mask.sum())))

    def told(self) -> list[str]:
        """How many passes, the largest, and the share of padding; the next ones are counted anew."""
        shapes, self.shapes = self.shapes, []
        padded = sum(num_rows * length for num_rows, length, _ in shapes)
        padding = 1 - sum(real for *_, real in shapes) / padded
        return [str(len(shapes)), str(max(num_rows for num_rows, *_ in shapes)), f"{padding:.1%}"]


def prepare(model: Any, tokenizer: Any) -> HeldOut:
    """The embedded prompts, and the masks that the method finds on the embedded batches."""
    batches = assemble_batches(records_to_examples(embedded_records("train"))).batches
    counts = pipeline.capture(model, tokenizer, batches)
    found = pipeline.identify(counts, permutations=0, resamples=0).masks
    frame = examples_to_frame(records_to_examples(embedded_records("test")))
    frame["batch_idx"] = assign_reference_batches(frame, batches_to_frame(batches))
    rows = [
        TokenizedRow(encode_prompt(tokenizer, json.loads(messages)), encode_answer(tokenizer, target or "I will not."))
        for messages, target in zip(frame["messages"], frame["target"], strict=True)
    ]
    ordered = in_answering_order(frame.assign(routing="natural", place=range(len(frame))))
    batch_idx = frame["batch_idx"].tolist()
    return HeldOut(rows, batch_idx, {batch: found[batch] for batch in set(batch_idx)}, ordered["place"].tolist())


def ways_of(
    model: Any, tokenizer: Any, held_out: HeldOut, args: argparse.Namespace
) -> dict[str, Callable[[], list[Any]]]:
    """Every way by what it says, each gives one answer or loss a row in the order of arrival."""
    prompts, num_rows, pad_id = held_out.prompts, len(held_out.rows), pad_token_id(tokenizer)

    def responses(rows: Sequence[int]) -> list[str]:
        some = [prompts[row] for row in rows]
        return [said.text for said in generate_responses(model, tokenizer, some, max_new_tokens=args.new_tokens)]

    def in_blocks(order: Sequence[int]) -> list[str]:
        answers = [""] * num_rows
        for start in range(0, num_rows, ROWS_BEFORE):
            rows = order[start : start + ROWS_BEFORE]
            for row, text in zip(rows, responses(rows), strict=True):
                answers[row] = text
        return answers

    def masked_before() -> list[str]:
        answers = [""] * num_rows
        for mask_LE, rows in held_out.of_a_mask():
            with route_through(model, mask_LE):
                for row, text in zip(rows, responses(rows), strict=True):
                    answers[row] = text
        return answers

    def losses_before() -> list[float]:
        losses = [0.0] * num_rows
        for mask_LE, rows in held_out.of_a_mask():
            some = [held_out.rows[row] for row in rows]
            with route_through(model, mask_LE):
                found = target_losses(
                    model, some, budget=TokenBudget(EvaluateConfig().tokens_per_forward), pad_id=pad_id
                )
            for row, loss in zip(rows, found, strict=True):
                losses[row] = loss
        return losses

    def within(group: Sequence[int]) -> Any:
        return route_rows_through(model, np.stack([held_out.masks[held_out.batch_idx[row]] for row in group]))

    def answers(budget: int, **how: Any) -> list[str]:
        said = generate_answers(
            *(model, tokenizer, prompts), max_new_tokens=args.new_tokens, budget=TokenBudget(budget), **how
        )
        return [answer.text for answer in said]

    def losses(budget: int) -> list[float]:
        return target_losses(model, held_out.rows, budget=TokenBudget(budget), pad_id=pad_id, within=within)

    arrival = range(num_rows)
    ways: dict[str, Callable[[], list[Any]]] = {
        f"natural, {ROWS_BEFORE} rows as they arrive (before)": lambda: in_blocks(arrival),
        f"natural, {ROWS_BEFORE} rows, the longest first": lambda: in_blocks(held_out.order),
    }
    for budget in args.budgets:
        ways[f"natural, {budget} tokens"] = lambda budget=budget: answers(budget)
    ways[f"masked, a generate for each of {len(held_out.masks)} masks (before)"] = masked_before
    for budget in args.budgets:
        ways[f"masked, {budget} tokens, a mask per row"] = lambda budget=budget: answers(budget, within=within)
    ways["masked losses, a pass for each mask (before)"] = losses_before
    for budget in args.budgets:
        ways[f"masked losses, {budget} tokens, a mask per row"] = lambda budget=budget: losses(budget)
    return ways


def agreement(got: Sequence[Any], before: Sequence[Any]) -> str:
    """How far two ways agree."""
    if isinstance(before[0], float):
        return f"{np.abs(np.subtract(got, before)).max():.1e} nats"
    return f"{sum(one == other for one, other in zip(got, before, strict=True))} of {len(before)}"


def measure(model: Any, ways: dict[str, Callable[[], list[Any]]], turns: int) -> pd.DataFrame:
    """A row per way."""
    passes, results, told = Passes(model), {}, {}
    for name, way in ways.items():  # also warms up
        results[name], told[name] = way(), passes.told()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns):
        for name in list(ways)[:: 1 if turn % 2 == 0 else -1]:
            started = time.process_time()
            ways[name]()
            seconds[name].append(time.process_time() - started)
    passes.told()
    rows, before = [], ""
    for name in ways:
        before = name if name.endswith("(before)") else before
        least = min(seconds[name])
        rows.append([name, *told[name], f"{least:.2f}", f"{min(seconds[before]) / least:.1f}x"])
        rows[-1].append(agreement(results[name], results[before]))
    return pd.DataFrame(rows, columns=["way", "passes", "rows, most", "padding", "CPU s", "faster", "equal"])


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--budgets", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384], help="tokens of a pass"
    )
    parser.add_argument("--new-tokens", type=int, default=EvaluateConfig().max_new_tokens, help="of an answer")
    parser.add_argument("--turns", type=int, default=3, help="runs of each way, after one that warms up")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    set_verbosity_error()
    disable_progress_bar()
    config = ModelConfig(path=str(build_embedded(ROOT / ".cache")))
    model, tokenizer = load_model(config, device="cpu"), load_tokenizer(config)
    held_out = prepare(model, tokenizer)
    lengths = [len(prompt) for prompt in held_out.prompts]
    before = os.getloadavg()[0]
    table = measure(model, ways_of(model, tokenizer, held_out, args), args.turns)
    print(f"{len(lengths)} prompts of {min(lengths)} to {max(lengths)} tokens, up to {args.new_tokens} new ones;")
    print(f"{args.threads} thread(s), torch {torch.__version__}, load {before:.1f} to {os.getloadavg()[0]:.1f}\n")
    print(f"| {' | '.join(table.columns)} |\n|{' --- |' * len(table.columns)}")
    for row in table.itertuples(index=False):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()

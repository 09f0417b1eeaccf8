"""What unlike lengths cost a training step: padding within a batch, and workers that wait for the longest batch of a step.

    python benchmarks/step_lengths.py

Prompts have the lengths of `capture_pipeline.py` (lognormal, median 36 tokens) and answers of 20 tokens; a batch has 16. The
first table runs the training of `training.py` on such batches: CPU seconds of one thread, side by side. The others are
computed from the plans that a run makes, in tokens, padding and passes included.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Mapping, Sequence

# Read when torch is imported; see `training.py`.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from training import build, make_masks

from moe_ray.config.finetune import FinetuneConfig
from moe_ray.finetuning.gradients import accumulate_gradient, without_noise
from moe_ray.finetuning.schedule import plan_steps, share_out
from moe_ray.finetuning.trainable_experts import trainable_experts
from moe_ray.models.loss import micro_batches
from moe_ray.models.tokenization import TokenizedRow

ROWS, ANSWER = 16, 20
DEFAULT = FinetuneConfig().tokens_of_a_pass
NEVER = 10**9
"""As the cost of a pass: every batch stays in one."""


def random_batch(generator: np.random.Generator, vocab: int = 512) -> list[TokenizedRow]:
    """Rows of unlike length; the ids are in the vocabulary of every shape."""
    lengths = generator.lognormal(3.6, 0.8, ROWS).astype(int) + 1
    return [
        TokenizedRow(generator.integers(3, vocab, length).tolist(), generator.integers(3, vocab, ANSWER).tolist())
        for length in lengths
    ]


def passes(rows: Sequence[TokenizedRow], tokens_of_a_pass: int) -> tuple[int, int]:
    """Micro-batches of a batch, and their tokens with padding."""
    groups = micro_batches(rows, rows_per_forward=ROWS, tokens_of_a_pass=tokens_of_a_pass)
    return len(groups), sum(len(group) * max(row.num_tokens for row in group) for group in groups)


def padding_table(args: argparse.Namespace) -> str:
    """CPU seconds of a batch's gradient for several prices of a pass."""
    torch.set_num_threads(1)
    generator = np.random.default_rng(0)
    batches = {number: random_batch(generator) for number in range(args.batches)}
    options = argparse.Namespace(shape=args.shape, device="cpu", dtype="float32", experts="auto", one="ours")
    model = build(options)
    masks = make_masks(model, batches)
    prices = [NEVER, *args.prices]
    seconds: dict[int, list[float]] = {price: [] for price in prices}
    losses: dict[int, list[float]] = {price: [] for price in prices}
    with trainable_experts(model, masks.union) as trainable, without_noise(model):
        for turn, (batch, rows) in enumerate([(0, batches[0]), *batches.items()]):
            for price in prices:
                config = FinetuneConfig(rows_per_forward=ROWS, tokens_of_a_pass=price)
                started = time.process_time()
                seen = accumulate_gradient(model, trainable, rows, masks[batch], config=config, pad_id=0)
                for parameter in trainable.all_parameters():
                    parameter.grad = None
                if turn:  # the first one is a warm-up
                    seconds[price].append(time.process_time() - started)
                    losses[price].append(seen.loss)
    lines = ["| a pass costs, tokens | passes a batch | padding | CPU s a batch | of one pass | loss differs by |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    real = sum(row.num_tokens for rows in batches.values() for row in rows)
    for price in prices:
        counts, padded = zip(*(passes(rows, price) for rows in batches.values()), strict=True)
        mean, whole = statistics.mean(seconds[price]), statistics.mean(seconds[NEVER])
        apart = max(abs(a - b) for a, b in zip(losses[price], losses[NEVER], strict=True))
        name = "one pass" if price == NEVER else f"{price}{' (default)' if price == DEFAULT else ''}"
        lines.append(
            f"| {name} | {statistics.mean(counts):.1f} | {1 - real / sum(padded):.0%} | {mean:.2f} | "
            f"{mean / whole:.2f} | {apart:.0e} |"
        )
    return "\n".join(lines)


def lost_share(
    plan: Sequence[Sequence[int]], costs: Mapping[int, float], num_workers: int, lengths: Mapping[int, int]
) -> float:
    """Share of all workers' time in which they wait for the slowest one."""
    spent = longest = 0.0
    for step in plan:
        loads = [0.0] * num_workers
        for batch, worker in zip(step, share_out(step, num_workers=num_workers, lengths=lengths or None), strict=True):
            loads[worker] += costs.get(batch, 0.0)
        spent, longest = spent + sum(loads), longest + max(loads) * num_workers
    return 1 - spent / longest


def waiting_table(args: argparse.Namespace, per_worker: int) -> str:
    """Lost worker time with so many batches a worker and step, for the plan as it was and as it is."""
    generator = np.random.default_rng(1)
    pool = [random_batch(generator) for _ in range(2_000)]
    one_pass = [passes(rows, NEVER)[1] for rows in pool]
    several = [tokens + count * DEFAULT for count, tokens in (passes(rows, DEFAULT) for rows in pool)]
    tokens = [sum(row.num_tokens for row in rows) for rows in pool]
    # A tokenizer makes of each row's bytes more or fewer tokens: 4.2 bytes a token, and a sixth more or less.
    num_bytes = [round(sum(r.num_tokens * b for r, b in zip(rows, bytes_, strict=True))) for rows, bytes_ in zip(
        pool, generator.lognormal(np.log(4.2), 0.15, (len(pool), ROWS)), strict=True)]  # fmt: skip
    heads = [
        "workers",
        "before: drawn, one pass",
        "drawn, several passes",
        "windows by tokens",
        "**now: windows by bytes**",
    ]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for num_workers in args.workers:
        size = num_workers * per_worker
        ids = list(range(size * max(50, min(args.steps, 200_000 // size))))
        drawn = generator.integers(0, len(pool), len(ids))
        cells = [str(num_workers)]
        for costs, window, known in (
            (one_pass, 0, None),
            (several, 0, None),
            (several, FinetuneConfig().length_window, tokens),
            (several, FinetuneConfig().length_window, num_bytes),
        ):
            lengths = {batch: known[drawn[batch]] for batch in ids} if known else {}
            plan = plan_steps(ids, epochs=1, batches_per_step=size, seed=0, lengths=lengths or None, window=window)
            cells.append(f"{lost_share(plan, {batch: costs[drawn[batch]] for batch in ids}, num_workers, lengths):.0%}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="200m", help="of `training.py`")
    parser.add_argument("--batches", type=int, default=6, help="that are run")
    parser.add_argument("--prices", nargs="+", type=int, default=[512, 256, 128, 64, 0], help="of a pass, in tokens")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2, 8, 64, 1000])
    parser.add_argument("--steps", type=int, default=1_000, help="of a plan, fewer where they have many batches")
    parser.add_argument("--no-model", action="store_true", help="only the tables that are computed")
    args = parser.parse_args()
    for per_worker in (1, 4):
        print(f"\nShare of worker time lost, batches of a worker and step: {per_worker}\n")
        print(waiting_table(args, per_worker))
    if not args.no_model:
        print("\nPadding and passes of a batch\n")
        print(padding_table(args))


if __name__ == "__main__":
    main()

"""What counting the routing adds to a forward pass.

    python benchmarks/capture_overhead.py
    python benchmarks/capture_overhead.py --device cuda --shape olmoe-1b-7b --dtype bfloat16

Each figure is a ratio: `count_rows`, from token ids to counts on the host, against the bare forward of the same model
without language-model head on tensors that lie ready. Both run in one process in turn (A B C C B A …); the ratio is taken
within each turn, and the median of turns is shown with its quartiles. Models are random, with routers that spread tokens:
cost does not depend on what weights say. On CPU the ratio of process CPU time is the one to read: other processes on the
machine move wall time. They move CPU time a little too, so there the table also has what counting itself takes, measured
inside one and the same pass: the CPU time that is not the model's, as a share of the model's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import DeepseekV3Config, OlmoeConfig, PreTrainedModel
from transformers.utils.logging import set_verbosity_error

from moe_ray.models.tokenization import TokenizedRow, pad_rows
from moe_ray.routing.capture import count_rows
from moe_ray.routing.counter import counting
from moe_ray.testing.random_model import random_model

_TOKENS: dict[str, int] = {"vocab_size": 8192, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def olmoe(hidden: int, intermediate: int, layers: int, *, experts: int = 64, per_token: int = 8) -> OlmoeConfig:
    """OLMoE: softmax over all experts, top 8 of 64, no dense layer."""
    return OlmoeConfig(
        **_TOKENS,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 128),
        num_key_value_heads=max(1, hidden // 128),
        num_experts=experts,
        num_experts_per_tok=per_token,
    )


def deepseek(
    hidden: int, intermediate: int, layers: int, *, experts: int = 128, per_token: int = 8
) -> DeepseekV3Config:
    """DeepSeek-V3: sigmoid scores, a correction bias, 8 groups of which 4 are open, a shared expert, a dense first layer."""
    return DeepseekV3Config(
        **_TOKENS,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        moe_intermediate_size=intermediate,
        num_hidden_layers=layers,
        first_k_dense_replace=1,
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=max(1, hidden // 64),
        n_routed_experts=experts,
        num_experts_per_tok=per_token,
        n_group=8,
        topk_group=4,
        q_lora_rank=hidden // 2,
        kv_lora_rank=hidden // 4,
        qk_rope_head_dim=32,
        qk_nope_head_dim=32,
        v_head_dim=64,
    )


SHAPES: dict[str, dict[str, Callable[[], Any]]] = {
    "tiny": {"OLMoE-like": lambda: olmoe(64, 32, 2), "DeepSeek-V3-like": lambda: deepseek(64, 32, 3)},
    "small": {"OLMoE-like": lambda: olmoe(512, 256, 6), "DeepSeek-V3-like": lambda: deepseek(512, 192, 5)},
    "olmoe-1b-7b": {"OLMoE-1B-7B": lambda: olmoe(2048, 1024, 16)},
    "large": {"OLMoE-1B-7B": lambda: olmoe(2048, 1024, 16), "DeepSeek-V3-like": lambda: deepseek(2048, 768, 12)},
}


def build(config: Any, args: argparse.Namespace) -> PreTrainedModel:
    """The model on its device, experts run the way moe-ray loads them there."""
    experts = "eager" if args.device == "cpu" else ""
    return random_model(config, device=args.device, dtype=getattr(torch, args.dtype), experts_implementation=experts)


def measure(model: PreTrainedModel, length: int, args: argparse.Namespace) -> list[str]:
    """The row's figures for rows of `length` tokens."""
    num_rows = max(1, args.tokens // length)
    ids = np.random.default_rng(0).integers(3, model.config.vocab_size, size=(num_rows, length)).tolist()
    rows = [TokenizedRow(row[: length // 2], row[length // 2 :]) for row in ids]
    padded = pad_rows(rows, pad_id=0).to(model.device)

    def bare() -> None:
        with torch.inference_mode():
            model.base_model(input_ids=padded.input_ids_BS, attention_mask=padded.attention_mask_BS, use_cache=False)

    def counted(**options: bool) -> tuple[float, float]:
        # The counter is attached once for many passes, so attaching it is not part of a pass.
        with counting(model, **options) as counter:
            return timed(lambda: count_rows(model, counter, rows, pad_id=0), args)

    def share_of_counting() -> float:
        with counting(model) as counter:
            observing, forward = Stopwatch(counter, "observe"), Stopwatch(model.base_model, "forward")
            total, _ = timed(lambda: count_rows(model, counter, rows, pad_id=0), args)
        forward.remove()
        models = forward.seconds - observing.seconds
        return (total - models) / models

    ways = [lambda: timed(bare, args), counted, lambda: counted(weights=True, ids=True)]
    for way in ways:
        way()
    turns = []
    for turn in range(args.turns):
        order = list(range(len(ways)))[:: 1 if turn % 2 == 0 else -1]
        times = {index: ways[index]() for index in order}
        turns.append([times[index] for index in range(len(ways))])
    cpu, wall = np.array(turns).transpose(2, 0, 1)
    shown = [spread(wall[:, 1] / wall[:, 0]), spread(wall[:, 2] / wall[:, 0])]
    if args.device == "cpu":
        shares = f"{100 * statistics.median(share_of_counting() for _ in range(args.turns)):.1f}%"
        shown = [spread(cpu[:, 1] / cpu[:, 0]), spread(cpu[:, 2] / cpu[:, 0]), shown[0], shares]
    return [f"{num_rows} x {length}", f"{statistics.median((cpu if args.device == 'cpu' else wall)[:, 0]):.3f}", *shown]


class Stopwatch:
    """CPU seconds spent in a method of one object."""

    def __init__(self, owner: Any, name: str) -> None:
        self.seconds = 0.0
        self.remove = lambda: delattr(owner, name)
        method = getattr(owner, name)

        def measured(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            result = method(*args, **kwargs)
            self.seconds += time.process_time() - started
            return result

        setattr(owner, name, measured)


def timed(way: Callable[[], object], args: argparse.Namespace) -> tuple[float, float]:
    """Process CPU seconds and wall seconds of one pass, the device's work included."""
    synchronize(args)
    cpu, wall = time.process_time(), time.perf_counter()
    way()
    synchronize(args)
    return time.process_time() - cpu, time.perf_counter() - wall


def synchronize(args: argparse.Namespace) -> None:
    """Waits for the device."""
    if args.device != "cpu":
        torch.cuda.synchronize()


def spread(ratios: Any) -> str:
    """Median and quartiles."""
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024], help="tokens of a row")
    parser.add_argument("--tokens", type=int, default=0, help="tokens of a forward; 0 = 1024 on CPU, 16384 on a GPU")
    parser.add_argument("--turns", type=int, default=9, help="passes of each way")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args()
    args.tokens = args.tokens or (1024 if args.device == "cpu" else 16384)
    torch.set_num_threads(args.threads)
    set_verbosity_error()
    kind = "CPU s" if args.device == "cpu" else "s"
    titles = [
        "model",
        "parameters",
        "rows x tokens",
        f"bare forward, {kind}",
        "with counts",
        "with counts, weights, ids",
    ]
    titles += ["with counts, wall", "counting itself"] if args.device == "cpu" else []
    device = f"{args.threads} CPU thread(s)" if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"{device}, {args.dtype}, torch {torch.__version__}, {args.turns} turns; ratios to the bare forward\n")
    print(f"| {' | '.join(titles)} |\n|{' --- |' * len(titles)}")
    for name, config in SHAPES[args.shape].items():
        model = build(config(), args)
        parameters = f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M"
        for length in args.lengths:
            print(f"| {' | '.join([name, parameters, *measure(model, length, args)])} |", flush=True)


if __name__ == "__main__":
    main()

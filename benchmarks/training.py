"""What a step of each way to fine-tune experts costs: time, peak memory, bytes of gradients and optimiser state.

    python benchmarks/training.py
    python benchmarks/training.py --device cuda --shape olmoe-1b-7b --dtype bfloat16

A randomly initialised OLMoE is trained on random tokens: cost does not depend on what weights say, as long as the router's
are as small as real ones (`random_model`). Each batch's mask holds 6 experts a layer, drawn from a union of a third of all
experts. Every method runs in a process of its own, so that its peak memory is its own, and makes the same number of steps on
the same batches with a fused AdamW; the turns alternate, so that other work on the machine meets all methods. CPU time is
that of the work alone: threads that wait for work sleep. With one thread it does not depend on what else is running.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

# Read when torch is imported. Threads that spin while they wait count as CPU time, and slow each other down.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from transformers import OlmoeConfig, PreTrainedModel
from transformers.utils.logging import set_verbosity_error

from moe_ray.config.finetune import FinetuneConfig
from moe_ray.experts import Expert, ExpertMasks, masks_from_experts
from moe_ray.finetuning import expert_forward
from moe_ray.finetuning import trainer as trainer_module
from moe_ray.finetuning.optimizer import adamw
from moe_ray.finetuning.step_report import StepReport
from moe_ray.finetuning.trainable_experts import trainable_experts
from moe_ray.finetuning.trainer import MaskedTrainer
from moe_ray.models.loss import answer_loss
from moe_ray.models.moe_layers import find_moe_layers
from moe_ray.models.tokenization import TokenizedRow
from moe_ray.routing.masking import route_through
from moe_ray.testing.random_model import random_model

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 512},
    "200m": {"hidden_size": 512, "intermediate_size": 256, "num_hidden_layers": 8, "vocab_size": 8192},
    "olmoe-1b-7b": {"hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16, "vocab_size": 50304},
}
NUM_EXPERTS, NUM_EXPERTS_PER_TOK, EXPERTS_PER_MASK, UNION_SHARE = 64, 8, 6, 1 / 3
METHODS = {
    "full": "full fine-tuning",
    "full_plain": "full fine-tuning, plain AdamW",
    "hook": "fused tensor + gradient hook",
    "lora": "LoRA on all experts (rank 8)",
    "ours": "one parameter per union expert",
    "ours_plain": "the same, plain AdamW",
    "ours_stacked": "the same, plain AdamW, experts stacked",
}
# Eager's backward writes a zero tensor of all experts' size for each expert it ran, unless they are a list.
FASTEST_ON_CPU = {method: "grouped_mm" if method.startswith(("full", "lora")) else "eager" for method in METHODS}
Rows = list[TokenizedRow]


def build(args: argparse.Namespace) -> PreTrainedModel:
    """The model on its device, experts run the way moe-ray loads them there."""
    config = OlmoeConfig(
        **SHAPES[args.shape],
        num_attention_heads=8,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=NUM_EXPERTS_PER_TOK,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    implementation = FASTEST_ON_CPU[args.one] if args.experts == "auto" and args.device == "cpu" else args.experts
    experts = "" if implementation == "auto" else implementation
    return random_model(config, device=args.device, dtype=getattr(torch, args.dtype), experts_implementation=experts)


def make_batches(args: argparse.Namespace) -> dict[int, Rows]:
    """Random prompts and answers of equal length, half and half."""
    generator = np.random.default_rng(0)
    half, vocab = args.tokens // 2, SHAPES[args.shape]["vocab_size"]
    return {
        batch: [TokenizedRow(*generator.integers(3, vocab, size=(2, half)).tolist()) for _ in range(args.rows)]
        for batch in range(args.steps)
    }


def make_masks(model: PreTrainedModel, batches: dict[int, Rows]) -> ExpertMasks:
    """6 experts of every layer per batch, drawn from the layer's third of experts; together they cover it."""
    generator = np.random.default_rng(1)
    layers = find_moe_layers(model).layers
    unions = {layer: generator.permutation(NUM_EXPERTS)[: round(NUM_EXPERTS * UNION_SHARE)] for layer in layers}
    selected = {
        batch: [
            Expert(layer, int(unions[layer][(batch * EXPERTS_PER_MASK + n) % len(unions[layer])]))
            for layer in layers
            for n in range(EXPERTS_PER_MASK)
        ]
        for batch in batches
    }
    return masks_from_experts(selected, layers=layers, num_experts=NUM_EXPERTS)


class Meter:
    """Seconds of each step, and the largest sum of bytes in gradients and optimiser state."""

    def __init__(self, args: argparse.Namespace, optimizer: torch.optim.Optimizer) -> None:
        self.args, self.optimizer = args, optimizer
        self.gradient_bytes = self.state_bytes = 0
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def _before(self, *_: Any) -> None:
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.gradient_bytes = max(self.gradient_bytes, sum(g.numel() * g.element_size() for g in gradients))

    def _after(self, *_: Any) -> None:
        tensors = [v for state in self.optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
        self.state_bytes = sum(t.numel() * t.element_size() for t in tensors)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Times what happens inside."""
        _synchronize(self.args)
        started, cpu_started = time.perf_counter(), time.process_time()
        yield
        _synchronize(self.args)
        self.seconds.append(time.perf_counter() - started)
        self.cpu_seconds.append(time.process_time() - cpu_started)

    def result(self, model: PreTrainedModel, trainable: int) -> dict[str, Any]:
        """The row of the table; of two passes over the batches the first, which allocates optimiser state, is not timed."""
        on_gpu = self.args.device != "cpu"
        return {
            "seconds": statistics.median(self.seconds[self.args.steps :]),
            "cpu_seconds": statistics.median(self.cpu_seconds[self.args.steps :]),
            "peak_bytes": torch.cuda.max_memory_allocated()
            if on_gpu
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "gradient_bytes": self.gradient_bytes,
            "state_bytes": self.state_bytes,
            "trainable": trainable,
            "total": sum(p.numel() for p in model.parameters()),
        }


def _synchronize(args: argparse.Namespace) -> None:
    if args.device != "cpu":
        torch.cuda.synchronize()


def run_plain(args: argparse.Namespace, prepare: Callable[..., Any], *, masked: bool) -> dict[str, Any]:
    """The ordinary loop: `prepare(model, masks, batch)` says what trains, before the first step and for each batch."""
    model, batches = build(args), make_batches(args)
    masks = make_masks(model, batches)
    model = prepare(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if args.one == "full_plain":
        optimizer = plain_adamw(parameters, learning_rate=1e-4, weight_decay=0.01)
    else:
        optimizer = adamw(parameters, learning_rate=1e-4, weight_decay=0.01)
    meter = Meter(args, optimizer)
    for batch, rows in [*batches.items()] * 2:
        with meter.step():
            if masked:
                with route_through(model, masks[batch]), _gradient_hooks(model, masks[batch]):
                    answer_loss(model, rows, pad_id=0).mean().backward()
            else:
                answer_loss(model, rows, pad_id=0).mean().backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return meter.result(model, sum(p.numel() for p in parameters))


@contextmanager
def _gradient_hooks(model: PreTrainedModel, mask_LE: Any) -> Iterator[None]:
    handles = []
    for layer, row in zip(find_moe_layers(model), mask_LE, strict=True):
        keep = torch.as_tensor(row, device=model.device).view(-1, 1, 1)
        handles += [t.register_hook(lambda g, keep=keep: g * keep) for t in layer.expert_tensors().values()]
    yield
    for handle in handles:
        handle.remove()


def plain_adamw(
    parameters: list[torch.nn.Parameter], *, learning_rate: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW as torch makes it by default."""
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)


def train_full(args: argparse.Namespace) -> dict[str, Any]:
    """Every parameter trains."""
    return run_plain(args, lambda model: model, masked=False)


def train_hook(args: argparse.Namespace) -> dict[str, Any]:
    """The fused tensors train; a hook sets the gradients of other experts to zero."""

    def prepare(model: PreTrainedModel) -> PreTrainedModel:
        model.requires_grad_(False)
        for layer in find_moe_layers(model):
            for tensor in layer.expert_tensors().values():
                tensor.requires_grad_(True)
        return model

    return run_plain(args, prepare, masked=True)


def train_lora(args: argparse.Namespace) -> dict[str, Any]:
    """Low-rank updates of all experts, natural routing."""
    if importlib.util.find_spec("peft") is None:
        return {"missing": "peft not installed"}
    from peft import LoraConfig, get_peft_model

    def prepare(model: PreTrainedModel) -> Any:
        names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        return get_peft_model(model, LoraConfig(r=8, target_modules=[], target_parameters=names)).eval()

    return run_plain(args, prepare, masked=False)


def train_full_plain(args: argparse.Namespace) -> dict[str, Any]:
    """Every parameter trains, with torch's default AdamW."""
    return train_full(args)


def train_ours_plain(args: argparse.Namespace) -> dict[str, Any]:
    """moe-ray's own trainer, with torch's default AdamW."""
    trainer_module.adamw = plain_adamw  # type: ignore[attr-defined]
    return train_ours(args)


def train_ours_stacked(args: argparse.Namespace) -> dict[str, Any]:
    """The same, and the batch's experts are stacked for each forward pass."""
    expert_forward.ExpertList = torch.stack  # type: ignore[assignment,misc]
    return train_ours_plain(args)


def train_ours(args: argparse.Namespace) -> dict[str, Any]:
    """moe-ray's own trainer."""
    model, batches = build(args), make_batches(args)
    masks = make_masks(model, batches)
    config = FinetuneConfig(epochs=2, learning_rate=1e-4, weight_decay=0.01, rows_per_forward=args.rows)
    with trainable_experts(model, masks.union, dtype=getattr(torch, args.trained_dtype)) as trainable:
        trainer = MaskedTrainer(model, trainable, batches, masks, config, pad_id=0, seed=0)
        meter = Meter(args, trainer.optimizer)
        steps = ExitStack()
        steps.enter_context(meter.step())

        def after_step(_: StepReport) -> None:
            steps.close()
            steps.enter_context(meter.step())

        reports = trainer.run(after_step)
        return meter.result(model, trainable.num_parameters()) | {"losses": [report.loss for report in reports]}


def table(results: dict[str, dict[str, Any]], *, on_cpu: bool) -> str:
    """Markdown; ratios are to full fine-tuning, on a CPU those of CPU time, which other processes do not lengthen."""
    heads = [
        "method",
        "trainable",
        "s a step",
        "CPU s",
        "of full",
        "peak GB",
        "gradients GB",
        "optimiser GB",
        "of share",
    ]
    lines = [heads, ["---"] * len(heads)]
    full, union = results.get("full"), results.get("ours", {}).get("trainable")
    clock = "cpu_seconds" if on_cpu else "seconds"
    for name, row in results.items():
        if "missing" in row:
            lines.append([METHODS[name], row["missing"], *[""] * (len(heads) - 2)])
            continue
        cells = [METHODS[name], f"{row['trainable'] / 1e6:.1f} M of {row['total'] / 1e6:.1f} M"]
        cells += [f"{row['seconds']:.2f}", f"{row['cpu_seconds']:.2f}"]
        cells.append(f"{row[clock] / full[clock]:.2f}" if full else "")
        cells += [f"{row[key] / 1e9:.3f}" for key in ("peak_bytes", "gradient_bytes", "state_bytes")]
        # Of the union's share: of what full fine-tuning holds, times the union's share of the parameters.
        cells.append(f"{_held(row) / (_held(full) * union / full['total']):.2f}" if full and union else "")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _held(row: dict[str, Any]) -> int:
    return int(row["gradient_bytes"] + row["state_bytes"])


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="200m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the model")
    parser.add_argument("--trained-dtype", default="float32", help="of moe-ray's trained copies")
    parser.add_argument(
        "--experts",
        choices=("auto", "eager", "grouped_mm", "batched_mm"),
        default="auto",
        help="how transformers runs them; auto = on CPU the fastest for each method, on GPU the library's default",
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=4, help="batches, each trained twice; 4 cover the union")
    parser.add_argument("--rows", type=int, default=16, help="examples in a batch")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of an example, half of them answer")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="CPU threads; a table for each number")
    parser.add_argument("--turns", type=int, default=3, help="times that every method runs; the median counts")
    parser.add_argument("--one", choices=METHODS, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(args: argparse.Namespace, threads: int) -> dict[str, dict[str, Any]]:
    """Every method in a process of its own, in turns; of each the medians."""
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in args.methods}
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    for _ in range(args.turns):
        for method in args.methods:
            command = [sys.executable, *sys.argv, "--one", method]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
            runs[method].append(json.loads(done.stdout.splitlines()[-1]))
    return {
        method: results[0]
        if "missing" in results[0]
        else results[0] | {name: statistics.median(run[name] for run in results) for name in ("seconds", "cpu_seconds")}
        for method, results in runs.items()
    }


def main() -> None:
    """Prints a table for each number of threads."""
    args = parse()
    if args.one:
        set_verbosity_error()
        print(json.dumps(globals()[f"train_{args.one}"](args)))
        return
    for threads in args.threads:
        load = os.getloadavg()[0]
        results = measure(args, threads)
        print(f"\n{threads} threads, load {load:.1f} to {os.getloadavg()[0]:.1f}\n")
        print(table(results, on_cpu=args.device == "cpu"))
        losses = {name: row["losses"] for name, row in results.items() if "losses" in row}
        if len(losses) > 1:
            first = next(iter(losses.values()))
            apart = max(abs(a - b) for other in losses.values() for a, b in zip(first, other, strict=True))
            print(f"\nlargest difference between the losses of {', '.join(losses)}: {apart:.1e}")


if __name__ == "__main__":
    main()

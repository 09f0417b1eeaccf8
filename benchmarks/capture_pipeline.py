"""What the capture pipeline costs beside the model's own work, how it scales, and what it holds.

python benchmarks/capture_pipeline.py throughput   pipeline against a hand-written loop of the bare forward
python benchmarks/capture_pipeline.py prototype    against one prompt at a time with router logits saved per layer
python benchmarks/capture_pipeline.py scaling      1 to 16 actors whose forward is a sleep; where the driver saturates
python benchmarks/capture_pipeline.py memory       peak memory of driver and actors at 1x and 10x the prompts

Times are given as wall time and as processor time of the process that runs the model; on a busy machine only the latter
means much. A Ray of its own is started on this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

# Read when ray is imported, below: a local Ray listens on loopback only.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from moe_ray.config.capture import CaptureConfig
from moe_ray.config.cluster import ClusterConfig
from moe_ray.config.model import ModelConfig
from moe_ray.demo.examples import embedded_records
from moe_ray.models.forward_groups import group_by_length
from moe_ray.models.loading import load_model, load_tokenizer
from moe_ray.models.token_budget import MAX_PADDING, padded_tokens
from moe_ray.models.tokenization import TokenizedRow, encode_row, pad_rows
from moe_ray.orchestration.cluster.model_process import ModelHolder
from moe_ray.orchestration.cluster.ray_session import ray_session
from moe_ray.orchestration.jobs.capture import capture
from moe_ray.orchestration.jobs.capture_actor import MAX_CHUNK, CaptureActor, label_columns
from moe_ray.organisms.tokenizer import train_tokenizer
from moe_ray.prompts.example_tables import BATCHES, ROWS_PER_GROUP
from moe_ray.routing.counts import RoutingCounts
from moe_ray.routing.window_plan import SECONDS_PER_WINDOW, WindowPlan
from moe_ray.run_directory import CAPTURE, COUNTS, PROMPTS, RunDirectory
from moe_ray.storage.folder import Folder

ROWS_PER_BATCH = 16
UNUSED_MODEL = argparse.Namespace(hidden=64, layers=1, experts=8)
"""Of processes that sleep: a process of a run holds a model, whatever it does."""


class MeasuredActor(CaptureActor):
    """Writes down when it was ready, when it ended each window, and what it used; one file per process."""

    def __init__(self, holder: ModelHolder, job: Any) -> None:
        super().__init__(holder, job)
        self.usage = {"ready": time.time(), "cpu": time.process_time(), "windows": []}
        self.usage_lock = threading.Lock()

    def __call__(self, positions: Any) -> Any:
        """Counts a window, with as many threads as the loop has, and writes down what it took."""
        torch.set_num_threads(int(os.environ["BENCHMARK_THREADS"]))
        report = super().__call__(positions)
        with self.usage_lock:
            self.usage["windows"].append([time.time(), len(positions)])
            now = {"cpu_used": time.process_time() - self.usage["cpu"], "rss": peak_rss()}
            Folder.open(self.job.run_url).sub(CAPTURE).sub("usage").write_json(f"{os.getpid()}.json", self.usage | now)
        return report


class SleepingActor(MeasuredActor):
    """Uses no model but its tokenizer: a forward pass is a sleep, and its counts are zeros of OLMoE's shape."""

    def forward(self, examples: list[dict[str, Any]], rows: list[TokenizedRow]) -> RoutingCounts:
        """Zeros, after a sleep."""
        time.sleep(float(os.environ["BENCHMARK_SLEEP"]))
        columns = {name: np.asarray(values) for name, values in label_columns(examples).items()}
        text = {name: columns[name].astype(object) for name in ("label", "category", "pair")}
        return RoutingCounts(
            batch_idx=columns["batch_idx"],
            in_batch_idx=columns["in_batch_idx"],
            **text,
            role=np.full(len(rows), "prompt", dtype=object),
            num_tokens=np.array([len(row.prompt_ids) for row in rows]),
            counts_NLE=np.zeros((len(rows), 16, 64), dtype=np.int32),
            layers=tuple(range(16)),
            num_experts_per_tok=8,
        )


def peak_rss() -> float:
    """MB of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def make_tokenizer(work: Path) -> ModelConfig:
    """A checkpoint folder with a tokenizer and without weights."""
    texts = [record["prompt"] for record in embedded_records("train")]
    train_tokenizer(texts, 1024).save_pretrained(work / "model")
    OlmoeConfig(pad_token_id=0, eos_token_id=1).save_pretrained(work / "model")
    return ModelConfig(path=str(work / "model"))


def make_model(work: Path, args: argparse.Namespace) -> ModelConfig:
    """A randomly initialised OLMoE with a tokenizer."""
    model = make_tokenizer(work)
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=1024,
        hidden_size=args.hidden,
        intermediate_size=args.hidden // 2,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 64,
        num_experts=args.experts,
        num_experts_per_tok=args.experts // 8,
        pad_token_id=0,
        eos_token_id=1,
    )
    OlmoeForCausalLM(config).save_pretrained(work / "model")
    return model


def make_batches(folder: Path, examples: int) -> None:
    """Stored batches of prompts of mixed lengths, written a row group at a time."""
    rng = np.random.default_rng(0)
    words = " ".join(record["prompt"] for record in embedded_records("train")).split()
    writer = None
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, examples, ROWS_PER_GROUP):
        positions = np.arange(start, min(start + ROWS_PER_GROUP, examples))
        lengths = (rng.lognormal(3.6, 0.8, len(positions)) + 1).astype(int)
        texts = [" ".join(rng.choice(words, size=length)) for length in lengths]
        table = pa.table(
            {
                "batch_idx": positions // ROWS_PER_BATCH,
                "in_batch_idx": positions % ROWS_PER_BATCH,
                "id": [f"row{position}" for position in positions],
                "label": np.where(positions % ROWS_PER_BATCH < ROWS_PER_BATCH // 2, "safe", "unsafe"),
                "category": [""] * len(positions),
                "messages": [json.dumps([{"role": "user", "content": text}]) for text in texts],
                "response": pa.nulls(len(positions), pa.string()),
                "pair": pa.nulls(len(positions), pa.string()),
            }
        )
        writer = writer or pq.ParquetWriter(folder / BATCHES, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


@contextmanager
def local_ray(logical_cpus: int, *, threads: int = 1, sleep: float = 0.0) -> Iterator[None]:
    """A Ray of this machine's own, whose workers know the benchmark's settings."""
    os.environ |= {"BENCHMARK_THREADS": str(threads), "BENCHMARK_SLEEP": str(sleep)}
    with ray_session(ClusterConfig(num_cpus=logical_cpus)):
        yield


def usages(out: Path) -> list[dict[str, Any]]:
    """What the actors wrote down."""
    return [json.loads(file.read_text()) for file in (out / "usage").glob("*.json")]


def bare_loop(model: ModelConfig, batches: Path, config: CaptureConfig, threads: int) -> dict[str, float]:
    """Forward passes without LM head, one after another, over rows grouped as in the pipeline, tokenised beforehand."""
    torch.set_num_threads(threads)
    loaded, tokenizer = load_model(model, device="cpu"), load_tokenizer(model)
    messages = pq.read_table(batches / BATCHES, columns=["messages"])["messages"].to_pylist()
    rows = [encode_row(tokenizer, json.loads(text)) for text in messages]
    tokens = padded = 0
    started, started_cpu = time.perf_counter(), time.process_time()
    for start in range(0, len(rows), MAX_CHUNK):
        window = rows[start : start + MAX_CHUNK]
        lengths = [len(row.prompt_ids) for row in window]
        for group in group_by_length(lengths, max_tokens=config.tokens_per_forward, max_padding=MAX_PADDING):
            forward = pad_rows([window[row] for row in group], pad_id=0)
            with torch.inference_mode():
                loaded.base_model(forward.input_ids_BS, attention_mask=forward.attention_mask_BS, use_cache=False)
            tokens += sum(lengths[row] for row in group)
            padded += padded_tokens(lengths, group)
    wall, cpu = time.perf_counter() - started, time.process_time() - started_cpu
    return {"tokens": tokens, "wall": wall, "cpu": cpu, "padding": 1 - tokens / padded}


def run_pipeline(model: ModelConfig, work: Path, config: CaptureConfig) -> dict[str, Any]:
    """One capture; `wall` and `cpu` are the actor's from when it was ready, `start` is all before, `end` all after."""
    started = time.time()
    notes = capture(RunDirectory.open(str(work)), model, config, actor=MeasuredActor)
    (usage,) = usages(work / CAPTURE)
    last = max(end for end, _ in usage["windows"])
    return {
        "tokens": notes["tokens"],
        "padding": notes["padding_share"],
        "wall": last - usage["ready"],
        "cpu": usage["cpu_used"],
        "start": usage["ready"] - started,
        "end": time.time() - last,
        "bytes": sum(file.stat().st_size for file in (work / COUNTS).iterdir()),
    }


def throughput(args: argparse.Namespace) -> pd.DataFrame:
    """Tokens a second of the pipeline over those of the bare loop, in one run; the loop runs before and after."""
    with tempfile.TemporaryDirectory() as folder:
        work, config = Path(folder), CaptureConfig(tokens_per_forward=args.tokens_per_forward)
        model = make_model(work, args)
        make_batches(work / PROMPTS, args.examples)
        first = bare_loop(model, work / PROMPTS, config, args.threads)
        with local_ray(3, threads=args.threads):
            ours = run_pipeline(model, work, config)
        second = bare_loop(model, work / PROMPTS, config, args.threads)
    loop = {name: (first[name] + second[name]) / 2 for name in first}
    assert loop["tokens"] == ours["tokens"]
    print(
        f"{args.examples} prompts, {ours['tokens']:,} tokens, {ours['padding']:.1%} padding; start {ours['start']:.1f} s "
        f"(Ray's actor, imports, model), end {ours['end']:.1f} s; the loop's two runs took {first['cpu']:.1f} and "
        f"{second['cpu']:.1f} s of processor time"
    )
    rows = [
        (name, run["wall"], run["cpu"], loop["wall"] / run["wall"], loop["cpu"] / run["cpu"])
        for name, run in (("bare loop, tokenised before", loop), ("pipeline, one actor", ours))
    ]
    return pd.DataFrame(rows, columns=["way", "wall s", "processor s", "tokens/s, wall", "tokens/s, processor"])


def prototype(args: argparse.Namespace) -> pd.DataFrame:
    """Processor seconds and bytes per prompt of the usual prototype over the pipeline's."""
    with tempfile.TemporaryDirectory() as folder:
        work, config = Path(folder), CaptureConfig(tokens_per_forward=args.tokens_per_forward)
        model = make_model(work, args)
        make_batches(work / PROMPTS, args.examples)
        with local_ray(3, threads=args.threads):
            ours = run_pipeline(model, work, config)
        torch.set_num_threads(args.threads)
        loaded, tokenizer = load_model(model, device="cpu"), load_tokenizer(model)
        messages = pq.read_table(work / PROMPTS / BATCHES, columns=["messages"])["messages"].to_pylist()
        count, size = max(1, args.examples // 4), 0
        started, started_cpu = time.perf_counter(), time.process_time()
        for number, text in enumerate(messages[:count]):
            ids = torch.tensor([encode_row(tokenizer, json.loads(text)).prompt_ids])
            with torch.inference_mode():
                logits = loaded(ids, output_router_logits=True).router_logits
            file = work / f"{number}.npz"
            np.savez(file, **{f"layer{layer}": one.to(torch.float16).numpy() for layer, one in enumerate(logits)})
            size += file.stat().st_size
        wall, cpu = (time.perf_counter() - started) / count, (time.process_time() - started_cpu) / count
    n = args.examples
    rows = [
        ("one prompt at a time, router logits as fp16 per layer", 1000 * wall, 1000 * cpu, size / count),
        ("pipeline, one actor", 1000 * ours["wall"] / n, 1000 * ours["cpu"] / n, ours["bytes"] / n),
    ]
    table = pd.DataFrame(rows, columns=["way", "wall ms/prompt", "processor ms/prompt", "bytes/prompt"])
    factors = table.iloc[0, 1:] / table.iloc[1, 1:]
    return pd.concat([table, pd.DataFrame([["factor", *factors]], columns=table.columns)], ignore_index=True)


def scaling(args: argparse.Namespace) -> pd.DataFrame:
    """Windows a second of actors whose forward sleeps, over what they would do without any other work.

    "processes a driver serves" is computed: how many windows it hands out and takes back in the seconds that one takes.
    """
    rows = []
    for actors in args.actors:
        windows = args.windows_per_actor * actors
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            model = make_model(work, UNUSED_MODEL)
            config = CaptureConfig(num_actors=actors, tokens_per_forward=1 << 20, max_tokens=1 << 20, max_bad_share=1)
            make_batches(work / PROMPTS, windows * 64)
            with local_ray(actors + 2, sleep=args.sleep), windows_of(64) as moments:
                capture(RunDirectory.open(folder), model, config, actor=SleepingActor)
            # From report to report: neither the start nor the end of a capture grows with its windows.
            driver = (moments[-1] - moments[0]) / (len(moments) - 1)
            used = usages(work / CAPTURE)
        begin, end = max(actor["ready"] for actor in used), min(max(t for t, _ in actor["windows"]) for actor in used)
        done = sum(begin < t <= end for actor in used for t, _ in actor["windows"])
        forwards = forwards_per_window(args)
        rows.append(
            {
                "actors": actors,
                "windows": windows,
                "windows/s": done / (end - begin) if end > begin else float("nan"),
                "of sleeping alone": done / (end - begin) * args.sleep * forwards / actors if end > begin else np.nan,
                "actor processor ms/window": 1000 * sum(actor["cpu_used"] for actor in used) / windows,
                "driver processor ms/window": 1000 * driver,
                "processes a driver serves": int(SECONDS_PER_WINDOW / driver),
            }
        )
        print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def forwards_per_window(args: argparse.Namespace) -> float:
    """Mean forward passes of the windows that `scaling` hands out."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tokenizer = load_tokenizer(make_tokenizer(work))
        make_batches(work, 640)
        messages = pq.read_table(work / BATCHES, columns=["messages"])["messages"].to_pylist()
        lengths = [len(encode_row(tokenizer, json.loads(text)).prompt_ids) for text in messages]
    plans = [group_by_length(lengths[i : i + 64], max_padding=MAX_PADDING) for i in range(0, 640, 64)]
    return float(np.mean([len(plan) for plan in plans]))


@contextmanager
def windows_of(examples: int) -> Iterator[list[float]]:
    """Windows of so many examples, to see many of them soon; yields the driver's processor time at each report."""
    from moe_ray.orchestration.jobs import capture as module

    moments: list[float] = []

    class TimedPlan(WindowPlan):
        def measured(self, examples: int, seconds: float) -> None:
            moments.append(time.process_time())
            super().measured(examples, seconds)

    module.WindowPlan = partial(TimedPlan, min_rows=examples, max_rows=examples)
    try:
        yield moments
    finally:
        module.WindowPlan = WindowPlan


def memory(args: argparse.Namespace) -> pd.DataFrame:
    """Peak memory at 1x and 10x the prompts, in processes of their own."""
    rows = []
    for examples in (args.examples, 10 * args.examples):
        command = [sys.executable, __file__, "memory_once", "--examples", str(examples)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    last = {name: f"x {rows[1][name] / rows[0][name]:.2f}" for name in rows[0]}
    return pd.DataFrame([*rows, last])


def memory_once(args: argparse.Namespace) -> None:
    """One capture with an actor that does everything but run a model; prints the peaks."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = make_model(work, UNUSED_MODEL)
        # In a process of its own: what it holds is not the driver's.
        subprocess.run(
            [sys.executable, __file__, "batches", "--examples", str(args.examples), "--at", folder], check=True
        )
        with local_ray(3):
            before = peak_rss()
            config = CaptureConfig(max_tokens=1 << 20)
            capture(RunDirectory.open(folder), model, config, actor=SleepingActor)
        actors = [actor["rss"] for actor in usages(work / CAPTURE)]
        stored = (work / PROMPTS / BATCHES).stat().st_size / 1e6
    result = {
        "prompts": args.examples,
        "prompts, MB": stored,
        "driver before, MB": before,
        "driver peak, MB": peak_rss(),
    }
    print(json.dumps(result | {"actor peak, MB": max(actors)}))


def main() -> int:
    """Prints one benchmark's table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = {"throughput": throughput, "prototype": prototype, "scaling": scaling, "memory": memory}
    sizes = {"throughput": 2048, "prototype": 512, "scaling": 0, "memory": 4096}
    parser.add_argument("what", choices=[*tables, "memory_once", "batches"], metavar="{" + ",".join(tables) + "}")
    parser.add_argument("--examples", type=int, help=f"prompts (default: {sizes})")
    parser.add_argument("--hidden", type=int, default=256, help="the model's hidden size (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=8, help="its layers (default: %(default)s)")
    parser.add_argument("--experts", type=int, default=32, help="its experts per layer (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of both ways (default: %(default)s)")
    parser.add_argument("--tokens-per-forward", type=int, default=CaptureConfig().tokens_per_forward)
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="for scaling")
    parser.add_argument(
        "--sleep", type=float, default=0.2, help="seconds of a forward, for scaling (default: %(default)s)"
    )
    parser.add_argument("--windows-per-actor", type=int, default=4, help="for scaling (default: %(default)s)")
    parser.add_argument("--at", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what == "batches":
        make_batches(Path(args.at) / PROMPTS, args.examples)
        return 0
    if args.what == "memory_once":
        memory_once(args)
        return 0
    args.examples = args.examples or sizes[args.what]
    print(tables[args.what](args).to_string(index=False, float_format="{:.4g}".format))
    print(f"{os.cpu_count()} cores, 1-minute load {os.getloadavg()[0]:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

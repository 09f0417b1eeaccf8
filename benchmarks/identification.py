"""How honest, how good and how fast identification is, on simulated routing whose answer is known.

python benchmarks/identification.py null        false alarms on batches with nothing to find
python benchmarks/identification.py planted     precision and recall of each rule at 8+8, 16+16 and 64+64 prompts
python benchmarks/identification.py reduction   counts to risk differences, against a loop over tokens and layers
python benchmarks/identification.py ways        parts of one batch's statistics; the compiled kernel against numpy
python benchmarks/identification.py speed       1,000 batches of 48 x 128 experts from counts to masks through the real job
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import threading
import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import psutil
from scipy.stats import norm

from moe_ray.config.cluster import ClusterConfig
from moe_ray.config.identify import IdentifyConfig
from moe_ray.experts import Expert
from moe_ray.identification.findings import CERTAINTY
from moe_ray.identification.identify import identify, samples_of
from moe_ray.identification.mask_files import write_masks
from moe_ray.identification.pandas_export import export_pickle
from moe_ray.identification.permutation_test import permutation_test
from moe_ray.identification.risk import example_counts
from moe_ray.identification.risk_tables import batch_tables
from moe_ray.identification.selection import unsafe_experts
from moe_ray.identification.significance import cluster_interval, q_values, selection_stability, smallest_effect
from moe_ray.orchestration.cluster.ray_session import ray_session
from moe_ray.orchestration.jobs import identify as job
from moe_ray.prompts.quarantine import QUARANTINE, quarantine_frame
from moe_ray.report.certainty_text import describe_certainty
from moe_ray.report.run_text import describe_selection
from moe_ray.routing.count_tables import counts_to_table
from moe_ray.routing.counts import concat_counts
from moe_ray.run_directory import CAPTURE, COUNTS, IDENTIFY, PROMPTS, RunDirectory
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage import finish
from moe_ray.testing.simulated_counts import Population, simulate

OLMOE = Population(num_layers=16, num_experts=64, num_experts_per_tok=8)
QWEN3 = Population(num_layers=48, num_experts=128, num_experts_per_tok=8)
PROMPT = ("prompt",)
PLAIN = IdentifyConfig(roles=PROMPT, weighting="tokens")
"""Simulated counts are of prompts, without weights."""

NULL_SETTINGS = {
    "equal lengths": (OLMOE, "tokens"),
    "unsafe 4x longer": (replace(OLMOE, unsafe_tokens=(60, 200)), "tokens"),
    "unsafe 4x longer, prompts": (replace(OLMOE, unsafe_tokens=(60, 200)), "prompts"),
}
PLANTED_RULES: dict[str, dict[str, Any]] = {
    "risk_diff > 0.05, top 50": {},
    "… and maxT p <= 0.05": {"alpha": 0.05},
    "… and BH q <= 0.05": {"alpha": 0.05, "correction": "bh"},
    "… and stability >= 0.9": {"stability": 0.9},
    "equal weight per prompt": {"weighting": "prompts"},
    "per layer, 4 each": {"rule": "per_layer"},
    "ESFT token, top_p 0.2": {"rule": "esft_token"},
    "random, matched per layer": {"rule": "random"},
}


def null(args: argparse.Namespace) -> pd.DataFrame:
    """Share of batches from one population in which anything passes, and how many experts do."""
    rows = []
    for name, (population, weighting) in NULL_SETTINGS.items():
        selection = IdentifyConfig(roles=PROMPT, weighting=weighting, resamples=0)  # type: ignore[arg-type]
        alarms, above, token_tests = [], [], []
        for seed in range(args.batches):
            table = identify(simulate(population, seed=seed), selection)
            alarms.append(table["p_maxt"].min() <= 0.05)
            above.append(int((table["risk_diff"] > 0.05).sum()))
            token_tests.append(int((token_level_p(table) <= 0.05).sum()))
        rows.append(
            {
                "null batches of 8+8": name,
                "batches": args.batches,
                "any maxT p <= 0.05": np.mean(alarms),
                "experts with risk_diff > 0.05": np.mean(above),
                "experts with token-level z, p <= 0.05": np.mean(token_tests),
            }
        )
    return pd.DataFrame(rows)


def token_level_p(table: pd.DataFrame) -> pd.Series:
    """One-sided p of the z-test that takes tokens for independent."""
    safe, unsafe = table["a_safe"] + table["d_safe"], table["a_unsafe"] + table["d_unsafe"]
    pooled = (table["a_safe"] + table["a_unsafe"]) / (safe + unsafe)
    error = np.sqrt(pooled * (1 - pooled) * (1 / safe + 1 / unsafe)).replace(0, np.inf)
    return pd.Series(norm.sf(table["risk_diff"] / error), index=table.index)


def planted(args: argparse.Namespace) -> pd.DataFrame:
    """Precision and recall of each rule, pooled over batches, with 24 of 1,024 experts shifted."""
    rng = np.random.default_rng(0)
    truth = {Expert(layer, int(e)) for layer in range(4, 12) for e in rng.choice(64, 3, replace=False)}
    tables: dict[str, dict[str, str]] = {name: {} for name in PLANTED_RULES}
    for each, batches in ((8, args.batches), (16, args.batches), (64, max(1, args.batches // 4))):
        counts = simulate(
            OLMOE,
            num_batches=batches,
            safe_per_batch=each,
            unsafe_per_batch=each,
            planted=sorted(truth),
            shift=args.shift,
        )
        risk = identify(counts, PLAIN)
        for name, setting in PLANTED_RULES.items():
            chosen = [set(unsafe_experts(table, replace(PLAIN, **setting))) for _, table in batch_tables(risk)]
            hits, total = sum(len(experts & truth) for experts in chosen), sum(map(len, chosen))
            precision = f"{hits / total:.2f}" if total else "–"
            tables[name][f"{each}+{each}"] = (
                f"{precision} / {hits / (len(truth) * batches):.2f} ({total / batches:.0f})"
            )
        tables.setdefault("(certifiable at a typical expert)", {})[f"{each}+{each}"] = (
            f"{risk['certifiable'].median():.2f}"
        )
    print(f"{len(truth)} experts shifted by {args.shift}; precision / recall (experts a batch)")
    return pd.DataFrame(tables).T.reset_index(names="rule")


def reduction(args: argparse.Namespace) -> pd.DataFrame:
    """Seconds from one batch's routing to its risk differences, and whether they are equal."""
    counts = simulate(QWEN3)
    rng = np.random.default_rng(0)
    tokens, labels = int(counts.num_tokens.sum()), np.repeat(counts.label == "unsafe", counts.num_tokens)
    examples = np.repeat(np.arange(len(counts)), counts.num_tokens)
    ids = rng.random((tokens, 48, 128), dtype=np.float32).argpartition(8, axis=2)[:, :, :8]
    started = time.perf_counter()
    looped = loop_over_tokens(ids, labels)
    loop_seconds = time.perf_counter() - started
    started = time.perf_counter()
    keys = (examples[:, None, None] * 48 + np.arange(48)[None, :, None]) * 128 + ids
    binned = np.bincount(keys.ravel(), minlength=16 * 48 * 128).reshape(16, 48, 128).astype(np.int32)
    count_seconds = time.perf_counter() - started
    seconds, plain = [], replace(PLAIN, permutations=0, resamples=0)
    for _ in range(20):
        started = time.perf_counter()
        risk = identify(replace(counts, counts_NLE=binned), plain)
        seconds.append(time.perf_counter() - started)
    distance = float(np.abs(risk["risk_diff"].to_numpy() - looped.ravel()).max())
    ours = float(np.median(seconds))
    rows = [
        ("loop over tokens and layers", loop_seconds, 1.0),
        ("counts to risk differences", ours, loop_seconds / ours),
        ("… with counting the tokens' ids (bincount)", ours + count_seconds, loop_seconds / (ours + count_seconds)),
    ]
    print(f"one batch, {tokens} tokens, 48 layers x 128 experts, 8 a token; largest difference {distance:.1e}")
    return pd.DataFrame(rows, columns=["way", "seconds", "times faster"])


def loop_over_tokens(ids_TLK: np.ndarray, is_unsafe_T: np.ndarray) -> np.ndarray:
    """(L, E) risk differences, one token and layer at a time."""
    routed, tokens = np.zeros((2, ids_TLK.shape[1], 128)), np.zeros(2)
    for ids_LK, is_unsafe in zip(ids_TLK, is_unsafe_T, strict=True):
        tokens[int(is_unsafe)] += 1
        for layer, ids_K in enumerate(ids_LK):
            routed[int(is_unsafe), layer, ids_K] += 1
    return np.asarray(routed[1] / tokens[1] - routed[0] / tokens[0])


def write_parts(folder: Folder, num_batches: int, per_part: int) -> None:
    """Parquet files of batches; experts of a few simulated batches are renumbered at random to make many."""
    rng = np.random.default_rng(0)
    models = [simulate(QWEN3, seed=seed) for seed in range(4)]
    for start in range(0, num_batches, per_part):
        batches = [
            replace(
                models[i % len(models)],
                batch_idx=np.full(16, i),
                counts_NLE=models[i % len(models)].counts_NLE[:, :, rng.permutation(128)],
            )
            for i in range(start, min(start + per_part, num_batches))
        ]
        folder.write_table(f"part-{start:06d}.parquet", counts_to_table(concat_counts(batches)))


def write_run(url: str, num_batches: int) -> None:
    """A run directory as a capture of so many batches leaves it."""
    folder = Folder.open(url)
    write_parts(folder.sub(COUNTS), num_batches, per_part=20)
    names = np.arange(num_batches * 16)
    rows = {"batch_idx": names // 16, "in_batch_idx": names % 16, "id": names.astype(str), "category": "", "pair": None}
    labels = np.where(names % 16 < 8, "safe", "unsafe")
    messages = json.dumps([{"role": "user", "content": "some words of a prompt " * 10}])
    folder.sub(PROMPTS).write_table("batches.parquet", pd.DataFrame(rows).assign(label=labels, messages=messages))
    folder.sub(CAPTURE).write_table(QUARANTINE, quarantine_frame([]))


class Watch:
    """Processor seconds and peak memory of the processes that this one started, while it lasts."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[str, float, float]] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watch:
        self._look()
        self._before = dict(self._seen)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._done.wait(0.3):
            self._look()

    def _look(self) -> None:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                times, memory = process.cpu_times(), process.memory_info().rss / 2**20
                name, _, most = self._seen.get(process.pid, ("", 0.0, 0.0))
                said = " ".join(process.cmdline()[:1])
                name = "task" if name == "task" or said.startswith("ray::") else "ray"
                self._seen[process.pid] = (name, times.user + times.system, max(most, memory))

    def seconds(self, name: str) -> float:
        """Of tasks (with the start of their processes), or of Ray's own processes, since the watch began."""
        return sum(
            used - self._before.get(pid, ("", 0.0, 0.0))[1]
            for pid, (kind, used, _) in self._seen.items()
            if kind == name
        )

    def peak_of_a_task(self) -> float:
        """MB."""
        return max((most for kind, _, most in self._seen.values() if kind == "task"), default=0.0)


def speed(args: argparse.Namespace) -> pd.DataFrame:
    """The real job with Ray: processor seconds of tasks and driver, and the driver's peak memory, all at their defaults."""
    config = replace(PLAIN, compiled=not args.numpy, permutations=args.permutations)
    with tempfile.TemporaryDirectory() as work:
        # In a process of its own, so that the driver's peak memory is the job's.
        writer = multiprocessing.get_context("spawn").Process(target=write_run, args=(work, args.batches))
        writer.start()
        writer.join()
        run = RunDirectory.open(work)
        with ray_session(ClusterConfig(num_cpus=3)):
            at_start, wall, cpu = peak_mb(), time.perf_counter(), time.process_time()
            with Watch() as watch:
                folder = run.sub(IDENTIFY)
                masks, certainty = job.identify(run, folder, config, seed=0)
                joined = time.process_time() - cpu
                folder.write_table(CERTAINTY, certainty)
                write_masks(folder, masks)
                finish(folder, {}, {}, seconds=0.0)
                written = time.process_time() - cpu
                describe_selection(run.risk, run.masks, 8)
                describe_certainty(run.lengths, run.certainty, run.captured_examples, config)
                with open(f"{work}/export.pkl", "wb") as file:
                    about = {"masks": masks, "risk": run.risk, "batches": run.captured_examples}
                    export_pickle(file, **about, model_name="m", num_experts_per_tok=8)
                driver, wall = time.process_time() - cpu, time.perf_counter() - wall
        size = sum(os.path.getsize(run.risk.folder.file(name)) for name in run.risk.names)
    rows = {
        "batches": args.batches,
        "tasks, processor seconds, with the start of their processes": watch.seconds("task"),
        "driver, processor seconds": driver,
        "… of them plan, tasks, joining": joined,
        "… of them writing masks": written - joined,
        "… of them text, means, certainty, pickle": driver - written,
        "all told, processor seconds": watch.seconds("task") + driver,
        "Ray's own processes, processor seconds": watch.seconds("ray"),
        "wall seconds": wall,
        "peak memory of a task, MB": watch.peak_of_a_task(),
        "peak memory of the driver, MB": peak_mb(),
        "… before the job, with Ray": at_start,
        "risk table, MB": size / 1e6,
        "1-minute load of the machine": os.getloadavg()[0],
    }
    what = f"48 x 128 experts, 8+8 prompts, {'numpy' if args.numpy else 'C kernel'}, {args.permutations} permutations"
    return pd.DataFrame(rows.items(), columns=[what, "value"])


def peak_mb() -> float:
    """This process's peak memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ways(args: argparse.Namespace) -> pd.DataFrame:
    """Processor milliseconds of one batch's statistics, the compiled kernel against numpy, side by side."""
    batch = next(iter(example_counts(simulate(QWEN3))))
    samples, rows = samples_of(batch, "tokens"), []
    tests = {
        "exact, C kernel": {},
        "exact, numpy": {"compiled": False},
        "2,000 drawn, C kernel": {"limit": 2000},
        "2,000 drawn, numpy": {"limit": 2000, "compiled": False},
    }
    parts = {name: partial(permutation_test, samples, **setting) for name, setting in tests.items()}
    test = permutation_test(samples)
    parts |= {
        "stability": partial(selection_stability, samples, threshold=0.05, top_k=50),
        "interval": partial(cluster_interval, samples),
        "certifiable": partial(smallest_effect, samples, test),
        "q": partial(q_values, test.p_X),
        "everything": partial(identify, simulate(QWEN3), PLAIN),
    }
    for name, part in parts.items():
        seconds = []
        for _ in range(args.batches):
            started = time.process_time()
            part()
            seconds.append(time.process_time() - started)
        rows.append((name, 1000 * min(seconds)))
    return pd.DataFrame(rows, columns=["one batch of 48 x 128, 8+8 prompts", "processor ms"])


def main() -> int:
    """Prints one benchmark's table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {null: 200, planted: 12, reduction: 1, ways: 5, speed: 1000}
    parser.add_argument("what", choices=[function.__name__ for function in defaults])
    parser.add_argument("--batches", type=int, help="default: 200 for null, 12 for planted, 5 for ways, 1000 for speed")
    parser.add_argument("--shift", type=float, default=0.25, help="for planted (default: %(default)s)")
    parser.add_argument("--numpy", action="store_true", help="for speed: without the compiled kernel")
    parser.add_argument("--permutations", type=int, default=20_000, help="for speed (default: %(default)s)")
    args = parser.parse_args()
    function = next(function for function in defaults if function.__name__ == args.what)
    args.batches = args.batches or defaults[function]
    print(function(args).to_string(index=False, float_format="{:.4g}".format))
    return 0


if __name__ == "__main__":
    # Before the workers start: a core each, so threads inside a product would only get in each other's way.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    sys.exit(main())

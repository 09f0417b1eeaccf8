"""How honest, how good and how fast identification is, on simulated routing whose answer is known.

python benchmarks/identification.py null        false alarms on batches with nothing to find
python benchmarks/identification.py planted     precision and recall of each rule at 8+8, 16+16 and 64+64 prompts
python benchmarks/identification.py reduction   counts to risk differences, against a loop over tokens and layers
python benchmarks/identification.py speed       1,000 batches of 48 x 128 experts from Parquet to masks, 2 processes
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm

from moe_ray.config.identify import IdentifyConfig
from moe_ray.experts import Expert, masks_from_experts
from moe_ray.identification.identify import identify
from moe_ray.identification.mask_files import write_masks
from moe_ray.identification.selection import batch_tables, unsafe_experts
from moe_ray.routing.count_tables import counts_to_table, table_to_counts
from moe_ray.routing.counts import concat_counts
from moe_ray.storage.folder import Folder
from moe_ray.testing.simulated_counts import Population, simulate

OLMOE = Population(num_layers=16, num_experts=64, num_experts_per_tok=8)
QWEN3 = Population(num_layers=48, num_experts=128, num_experts_per_tok=8)
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
        selection = IdentifyConfig(weighting=weighting, resamples=0)  # type: ignore[arg-type]
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
        risk = identify(counts, IdentifyConfig())
        for name, setting in PLANTED_RULES.items():
            chosen = [set(unsafe_experts(table, IdentifyConfig(**setting))) for _, table in batch_tables(risk)]
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
    seconds, plain = [], IdentifyConfig(permutations=0, resamples=0)
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


def select_in_part(task: tuple[str, str]) -> tuple[dict[int, tuple[Expert, ...]], float, int]:
    """One file's batches: their unsafe experts, seconds of processor time, and this process's peak memory in KiB."""
    url, name = task
    started = time.process_time()
    counts = table_to_counts(Folder.open(url).read_table(name))
    selection = IdentifyConfig()
    selected = {}
    for batch in np.unique(counts.batch_idx):
        table = identify(counts.take(counts.batch_idx == batch), selection)
        selected[int(batch)] = unsafe_experts(table, selection)
    used = time.process_time() - started
    return selected, used, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def speed(args: argparse.Namespace) -> pd.DataFrame:
    """Wall and processor seconds and peak memory from Parquet to masks, all statistics at their defaults."""
    with tempfile.TemporaryDirectory() as work:
        folder = Folder.open(work)
        write_parts(folder, args.batches, per_part=20)
        tasks = [(folder.url, name) for name in folder.names() if name.endswith(".parquet")]
        size = sum(os.path.getsize(folder.file(name)) for _, name in tasks)
        started = time.perf_counter()
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            parts = pool.map(select_in_part, tasks, chunksize=1)
        selected = {batch: experts for part, *_ in parts for batch, experts in sorted(part.items())}
        write_masks(folder, masks_from_experts(selected, layers=range(48), num_experts=128))
        wall = time.perf_counter() - started
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = {
        "batches": args.batches,
        "Parquet, MB": size / 1e6,
        "wall seconds, 2 processes": wall,
        "processor seconds, both": sum(used for _, used, _ in parts),
        "ms of processor time a batch": 1000 * sum(used for _, used, _ in parts) / args.batches,
        "peak memory of a worker, MB": max(memory for *_, memory in parts) / 1024,
        "peak memory of the main process, MB": peak_kib / 1024,
        "1-minute load of the machine": os.getloadavg()[0],
    }
    return pd.DataFrame(rows.items(), columns=["48 x 128 experts, 8+8 prompts, exact tests", "value"])


def main() -> int:
    """Prints one benchmark's table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {null: 200, planted: 12, reduction: 1, speed: 1000}
    parser.add_argument("what", choices=[function.__name__ for function in defaults])
    parser.add_argument("--batches", type=int, help="default: 200 for null, 12 for planted, 1000 for speed")
    parser.add_argument("--shift", type=float, default=0.25, help="for planted (default: %(default)s)")
    args = parser.parse_args()
    function = next(function for function in defaults if function.__name__ == args.what)
    args.batches = args.batches or defaults[function]
    print(function(args).to_string(index=False, float_format="{:.4g}".format))
    return 0


if __name__ == "__main__":
    # Before the workers start: a core each, so threads inside a product would only get in each other's way.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    sys.exit(main())

"""What each part of a run's driver costs at 10^4, 10^5 and 10^6 examples, and by extrapolation at 10^7; without a model.

python benchmarks/driver.py                              10^4 and 10^5, in about a minute
python benchmarks/driver.py --sizes 10000 100000 1000000 some minutes
python benchmarks/driver.py --parts plan masks           only the parts whose names hold one of these words

Each part at each size runs in a process of its own, so its peak is its own; what a process holds before it begins is taken
off. Seconds are processor seconds. Prompts are of about a hundred characters, in batches of 8 + 8; counts are simulated, for
4 x 16 experts, in parts of 1,024 examples: what only looks at their keys does not depend on that. Masks are of 48 x 128.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moe_ray.config.io import with_settings
from moe_ray.config.run import Config
from moe_ray.experts import Expert, ExpertMasks, masks_from_experts
from moe_ray.finetuning.history import read_history, write_history
from moe_ray.identification.mask_files import read_masks, write_masks
from moe_ray.identification.risk import batches_with_both_labels
from moe_ray.prompts.example_tables import ROWS_PER_GROUP
from moe_ray.prompts.prompt_set import read_prompts
from moe_ray.routing.count_keys import keys_of, remove_doubles, rows_without
from moe_ray.routing.count_store import (
    batches_in_parts,
    count_tokens,
    digest_of_parts,
    plan_reads,
    read_batches,
    read_lengths,
)
from moe_ray.routing.count_tables import counts_to_table
from moe_ray.routing.window_plan import WindowPlan
from moe_ray.run_directory import RunDirectory
from moe_ray.storage.folder import Folder
from moe_ray.testing.simulated_counts import Population, simulate

PER_BATCH, PER_PART, AIM = 16, 1024, 10**7
WORDS = (
    "please",
    "tell",
    "me",
    "how",
    "to",
    "make",
    "grow",
    "clean",
    "bread",
    "paint",
    "the",
    "a",
    "old",
    "garden",
    "lamp",
)


@dataclass(frozen=True)
class Data:
    """What the parts read, at one size.

    Attributes:
        examples: how many.
        folder: where.
    """

    examples: int
    folder: Path

    @property
    def counts(self) -> Folder:
        """Parts of counts."""
        return Folder.open(str(self.folder / "counts"))

    @property
    def scratch(self) -> Folder:
        """What a part writes."""
        return Folder.open(str(self.folder / "scratch"))

    @property
    def stored(self) -> Folder:
        """What parts read beside counts."""
        return Folder.open(str(self.folder / "stored"))


def records(examples: int) -> Iterator[dict[str, Any]]:
    """Prompts, both labels in turn, a tenth of them held out."""
    rng = np.random.default_rng(0)
    for number in range(examples):
        words = " ".join(WORDS[word] for word in rng.integers(0, len(WORDS), 18))
        label, split = ("safe", "unsafe")[number % 2], "test" if number // 2 % 10 == 9 else "train"
        yield {"id": f"p{number}", "prompt": f"{words} {number}", "label": label, "split": split, "target": "No."}


def make(data: Data) -> None:
    """Writes everything that the parts read."""
    (data.folder / "counts").mkdir(parents=True)
    with (data.folder / "prompts.jsonl").open("w") as lines, (data.folder / "prompts.json").open("w") as array:
        for number, record in enumerate(records(data.examples)):
            line = json.dumps(record)
            lines.write(f"{line}\n")
            array.write(("[" if number == 0 else ",\n") + line)
        array.write("]")
    positions = np.arange(data.examples)
    keys = pa.table({"batch_idx": positions // PER_BATCH, "in_batch_idx": positions % PER_BATCH})
    data.stored.write_table("keys.parquet", keys, row_group_size=ROWS_PER_GROUP)
    # One part, simulated, stands for all; each holds batches of its own.
    part = counts_to_table(simulate(Population(), num_batches=PER_PART // PER_BATCH))
    for start in range(0, data.examples, PER_PART):
        rows = min(PER_PART, data.examples - start)
        shifted = part.slice(0, rows).set_column(0, "batch_idx", pa.array(np.arange(start, start + rows) // PER_BATCH))
        pq.write_table(shifted, data.folder / "counts" / f"part-{start:09d}.parquet", compression="zstd")
    masks = simulated_masks(data.examples // PER_BATCH)
    write_masks(data.stored, masks)
    batch = {"num_experts": 20, "num_experts_routed": 20, "num_tokens": 400, "num_input_tokens": 900, "loss": 1.25}
    numbers = {"epoch": 0, "num_experts": 20, "num_tokens": 400, "loss": 1.25, "grad_norm": 0.5, "learning_rate": 1e-3}
    write_history(
        data.stored,
        [
            {"step": step, "batches": [{"batch_idx": step, **batch}], **numbers, "seconds": 0.1, "batch_idx": step}
            for step in range(len(masks.batch_idx))
        ],
    )


def simulated_masks(num_batches: int) -> ExpertMasks:
    """Twenty experts of 48 x 128 a batch."""
    chosen = np.random.default_rng(0).integers(0, 48 * 128, (num_batches, 20))
    selected = {
        batch: tuple(dict.fromkeys(Expert(int(flat) // 128, int(flat) % 128) for flat in row))
        for batch, row in enumerate(chosen)
    }
    return masks_from_experts(selected, layers=tuple(range(48)), num_experts=128)


def prompts_from(name: str) -> Callable[[Data], object]:
    """Reads prompts from a file, splits and batches them."""

    def read(data: Data) -> object:
        return read_prompts(with_settings(Config(), {"prompts.files": [str(data.folder / name)]}))

    return read


def prepared(data: Data) -> object:
    """The stage `prepare`: prompts read, split, batched, hashed and stored, with the 2,000 held-out ones that are used."""
    from moe_ray.orchestration.run import Run

    work = data.folder / "run"
    settings = {"prompts.files": [str(data.folder / "prompts.jsonl")], "prompts.max_test_examples": 1000}
    config = with_settings(Config(), {**settings, "run_dir": str(work)})
    model = replace(config.model, path=str(data.folder / "model"))
    return Run(config, model, read_prompts(config), RunDirectory.open(str(work))).prepare()


def warm_up(name: str, data: Data) -> None:
    """Imports, and writes, what a part should not be charged for."""
    if PARTS[name] is prepared:
        from prompts import write_checkpoint

        import moe_ray.orchestration.run  # noqa: F401

        write_checkpoint(data.folder / "model")


def examples_to_do(data: Data) -> object:
    """Which examples no part holds, all of them being held."""
    with data.stored.open_parquet("keys.parquet") as file:
        table = file.read()
    keys = keys_of(table["batch_idx"].to_numpy(), table["in_batch_idx"].to_numpy())
    todo = rows_without(keys, data.counts, data.counts.parquet_names())
    assert not len(todo)
    return todo


def windows(data: Data) -> object:
    """Every window for 256 processes that count 2,500 examples a second."""
    plan = WindowPlan(np.arange(data.examples) // PER_BATCH, num_processes=256)
    number = 0
    while (window := plan.next()) is not None:
        number += 1
        plan.measured(len(window), len(window) / 2500)
    return number


def task_plan(data: Data) -> object:
    """Where every batch is, and the reads of 32 batches at a time."""
    where = batches_in_parts(data.counts, ["prompt"])
    where = where[where["batch_idx"].isin(batches_with_both_labels(where, ["prompt"]))]
    return list(plan_reads(where, batches_at_once=32))


def doubles(data: Data) -> object:
    """`remove_doubles`, with none to remove."""
    removed = remove_doubles(data.counts)
    assert removed == 0
    return removed


def digests(data: Data) -> object:
    """The digest and the number of tokens of all parts."""
    return digest_of_parts(data.counts), count_tokens(data.counts)


def streamed_counts(data: Data) -> object:
    """All counts read as a trial of a sweep reads them, 1,024 batches of 4 x 16 experts at a time."""
    where = batches_in_parts(data.counts, ["prompt"])
    return sum(
        len(read_batches(data.counts, names, batches)) for batches, names in plan_reads(where, batches_at_once=1024)
    )


def masks_written(data: Data) -> object:
    """Masks made of selected experts, and written."""
    write_masks(data.scratch, simulated_masks(data.examples // PER_BATCH))
    return None


def masks_used(data: Data) -> object:
    """Masks read, and each looked up once."""
    masks = read_masks(data.stored)
    return sum(int(masks[batch].any()) for batch in masks.batch_idx)


PARTS: Mapping[str, Callable[[Data], object]] = {
    "prompts: read, split, batch (JSONL)": prompts_from("prompts.jsonl"),
    "prompts: read, split, batch (JSON array)": prompts_from("prompts.json"),
    "prompts: the whole stage prepare": prepared,
    "capture: examples to do, from all parts": examples_to_do,
    "capture: plan of windows": windows,
    "capture: remove_doubles": doubles,
    "capture: digest and tokens": digests,
    "sweep: batches_in_parts and plan of reads": task_plan,
    "identify: lengths of all examples": lambda data: read_lengths(data.counts),
    "identify: masks made and written": masks_written,
    "finetune: masks read, each looked up": masks_used,
    "finetune: history read": lambda data: read_history(data.stored),
    "sweep: counts streamed by a trial": streamed_counts,
}


def memory(field: str) -> float:
    """MB of this process; the peak is that of this program, not of the one that started it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}; this benchmark needs Linux")


def run_part(name: str, data: Data) -> None:
    """Prints what one part took, as JSON."""
    warm_up(name, data)
    before, started = memory("VmRSS"), time.process_time()
    held = PARTS[name](data)
    seconds = time.process_time() - started
    print(json.dumps({"seconds": seconds, "mb": max(0.0, memory("VmHWM") - before)}))
    del held


def measured(name: str, data: Data, limit: float) -> dict[str, float] | None:
    """What one part took in a process of its own; None = it was stopped at the limit."""
    command = [sys.executable, __file__, "--part", name, "--size", str(data.examples), "--at", str(data.folder)]
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    try:
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, timeout=limit, env=os.environ | threads
        )
    except subprocess.TimeoutExpired:
        return None
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def growth(small: float, large: float, ratio: float) -> float:
    """The power of the number of examples by which something grew; 1 = in proportion."""
    return math.log(max(large, 1e-9) / max(small, 1e-9)) / math.log(ratio)


def extrapolated(values: list[tuple[int, float]], *, least: float) -> tuple[float, float] | None:
    """The value at `AIM` examples and the power it grows by, from the two largest sizes; None where there is too little.

    A value that grows more slowly than in proportion is taken to go on in proportion, above what it begins with.

    Args:
        values: by size, ascending.
        least: below this a value is mostly what every size costs.
    """
    if len(values) < 2 or values[-1][1] < least:
        return None
    (small, before), (large, after) = values[-2:]
    power = growth(before, after, large / small)
    if power > 1:
        return after * (AIM / large) ** power, power
    slope = (after - before) / (large - small)
    return after + max(0.0, slope) * (AIM - large), power


def main() -> int:
    """Prints the table, a row per part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**4, 10**5], help="examples (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", default=[""], help="words of the parts' names (default: all parts)")
    parser.add_argument("--limit", type=float, default=180, help="seconds after which a part is stopped (%(default)s)")
    for hidden in ("--part", "--at"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.at:
        data = Data(args.size, Path(args.at))
        make(data) if args.part is None else run_part(args.part, data)
        return 0
    chosen = [name for name in PARTS if any(word in name for word in args.parts)]
    results: dict[str, list[tuple[int, dict[str, float] | None]]] = {name: [] for name in chosen}
    for size in sorted(args.sizes):
        with tempfile.TemporaryDirectory() as folder:
            data = Data(size, Path(folder) / "data")
            subprocess.run([sys.executable, __file__, "--size", str(size), "--at", str(data.folder)], check=True)
            for name in chosen:
                before = results[name][-1:]
                # One that was stopped at a smaller size would be stopped again.
                result = None if before and before[0][1] is None else measured(name, data, args.limit)
                results[name].append((size, result))
                said = "stopped" if result is None else f"{result['seconds']:.2f} s, {result['mb']:.0f} MB"
                print(f"{size:>9,} {name}: {said}", file=sys.stderr, flush=True)
    print_table(results, args.limit)
    print(
        f"\n{os.cpu_count()} cores, 1-minute load {os.getloadavg()[0]:.1f}; processor s, MB above what is held before"
    )
    return 0


def print_table(results: Mapping[str, list[tuple[int, dict[str, float] | None]]], limit: float) -> None:
    """A row per part: time and peak memory at each size, and by extrapolation."""
    sizes = [size for size, _ in next(iter(results.values()))]
    heads = ["part", *(f"{size:,}" for size in sizes), "grows as", f"{AIM:,} (extrapolated)"]
    print("| " + " | ".join(heads) + " |")
    print("| " + " | ".join("---" for _ in heads) + " |")
    for name, by_size in results.items():
        cells = [
            f"> {limit:.0f} s" if result is None else f"{result['seconds']:.2f} s, {result['mb']:.0f} MB"
            for _, result in by_size
        ]
        found = [(size, result) for size, result in by_size if result is not None]
        seconds = extrapolated([(size, result["seconds"]) for size, result in found], least=0.05)
        mb = extrapolated([(size, result["mb"]) for size, result in found], least=20)
        power = "–" if seconds is None else f"n^{seconds[1]:.1f}"
        ends = [f"{seconds[0]:.0f} s" if seconds else "", f"{mb[0]:.0f} MB" if mb else ""]
        print("| " + " | ".join([name, *cells, power, ", ".join(filter(None, ends)) or "–"]) + " |")


if __name__ == "__main__":
    sys.exit(main())

"""What prompts cost the driver: seconds and memory of reading, splitting, grouping and writing them, by their number.

    python benchmarks/prompts.py
    python benchmarks/prompts.py --sizes 10000 100000 1000000 10000000

Each number of examples is a JSON Lines file, written to a temporary folder and read by a process of its own: `read_prompts`
(reading, checking, splitting, filling batches), then the stage `prepare` (the batches and held-out examples as Parquet).
Examples have one of 20 categories or none, and a target, so that no model is asked. Of the tenth that is held out 1,000 of
each label are used. Seconds are of one processor. Memory is the process's peak above what it had after imports, which is
told beside it. The last row is computed: what the largest number took, in proportion.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_EXTRAPOLATED = 10_000_000


def main() -> None:
    """Prints a row for each number of examples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], metavar="EXAMPLES")
    parser.add_argument("--folder", help="where temporary files go; default: the system's folder for them")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(measure(args.one)))
        return
    print("| examples | file, MB | read, CPU s | prepare, CPU s | us an example | wall s | memory, MB | imports, MB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for size in args.sizes:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            file = Path(folder) / "prompts.jsonl"
            write_prompts(file, size)
            write_checkpoint(Path(folder) / "model")
            command = [sys.executable, __file__, "--one", str(file)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            row = json.loads(done.stdout.splitlines()[-1]) | {"megabytes": file.stat().st_size / 1e6}
        print(line(f"{size:,}", row), flush=True)
    factor = _EXTRAPOLATED / size
    if factor > 1:
        grown = {name: value * (1 if name == "imports" else factor) for name, value in row.items()}
        print(line(f"{_EXTRAPOLATED:,} (computed)", grown, _EXTRAPOLATED))


def line(title: str, row: dict[str, float], size: int = 0) -> str:
    """A row of the table."""
    size = size or int(title.replace(",", ""))
    each = 1e6 * (row["read"] + row["prepare"]) / size
    cells = [f"{row['megabytes']:,.0f}", f"{row['read']:,.2f}", f"{row['prepare']:,.2f}", f"{each:.1f}"]
    cells += [f"{row['wall']:,.1f}", f"{row['memory']:,.0f}", f"{row['imports']:,.0f}"]
    return f"| {title} | {' | '.join(cells)} |"


def write_prompts(file: Path, size: int) -> None:
    """Examples of the lengths that prompts have: mostly some words, now and then a page."""
    draw = random.Random(0)
    words = [bytes(draw.choices(range(97, 123), k=draw.randint(2, 9))).decode() for _ in range(5_000)]
    categories = ["", *(f"category {number}" for number in range(20))]

    def text() -> str:
        return " ".join(draw.choices(words, k=min(1 + int(draw.expovariate(1 / 45)), 2_000)))

    with file.open("w") as out:
        for _ in range(size):
            label = draw.choice(["safe", "unsafe"])
            record = {"prompt": text(), "label": label, "category": draw.choice(categories), "target": "No."}
            out.write(json.dumps(record) + "\n")


def write_checkpoint(folder: Path) -> None:
    """All of a checkpoint that preparing prompts reads: its configuration and its tokenizer."""
    from transformers import OlmoeConfig

    from moe_ray.organisms.tokenizer import train_tokenizer

    train_tokenizer(["a prompt"], 300).save_pretrained(folder)
    OlmoeConfig(max_position_embeddings=4096).save_pretrained(folder)


def measure(file: Path) -> dict[str, float]:
    """Seconds of both parts, and the peak of memory in megabytes."""
    from dataclasses import replace

    from moe_ray.config.io import load_config
    from moe_ray.orchestration.run import Run
    from moe_ray.prompts.prompt_set import read_prompts
    from moe_ray.run_directory import RunDirectory

    words = [f"run_dir={file.parent}/run", f"prompts.files={file}", "prompts.test_fraction=0.1"]
    config = load_config(None, [*words, "prompts.max_test_examples=1000"])
    imports = peak_of_memory()
    began, started = time.perf_counter(), time.process_time()
    prompts = read_prompts(config)
    read = time.process_time()
    run = Run(
        config, replace(config.model, path=str(file.parent / "model")), prompts, RunDirectory.open(config.run_dir)
    )
    run.prepare()
    ended = time.process_time()
    return {
        "read": read - started,
        "prepare": ended - read,
        "wall": time.perf_counter() - began,
        "memory": peak_of_memory() - imports,
        "imports": imports,
    }


def peak_of_memory() -> float:
    """The most memory that this process has had, in megabytes; `ru_maxrss` would begin at that of the parent."""
    (peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(peak.split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    main()

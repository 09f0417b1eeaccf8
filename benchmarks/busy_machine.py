"""What another busy process costs: the demo's training alone and beside one, in turn.

    python benchmarks/busy_machine.py
    python benchmarks/busy_machine.py --checkout ../before --checkout . --steps 12

A run of the demo is prepared up to its masks, once. Then the training of that run is started as a user starts it, in turn
alone and beside one process that does nothing but keep a core busy. Compared are the seconds of the training steps as the
history has them, so that starts of processes do not count, and the learned experts, byte for byte.

`--checkout` (again and again) measures the moe-ray of another folder in the same run; `--steps` ends each training after so
many steps, for a version that would take minutes beside a busy process; experts are compared only where training ended.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_BUSY = "while True: pass"
_HISTORY, _EXPERTS = "finetune/history.jsonl", "finetune/experts.safetensors"


def main() -> None:
    """Prints a row per checkout and turn, and the ratio of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", action="append", help="folder with a moe_ray package; default: this one")
    parser.add_argument("--turns", type=int, default=2, help="of each way (default 2)")
    parser.add_argument("--steps", type=int, default=0, help="end each training after so many steps; 0 = all of it")
    args = parser.parse_args()
    checkouts = [Path(name).resolve() for name in args.checkout or [Path(__file__).parents[1]]]
    print(f"{len(os.sched_getaffinity(0))} cores, 1-minute load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as scratch:
        for position, checkout in enumerate(checkouts):
            prepared = Path(scratch) / f"prepared{position}"
            _moe_ray(checkout, "identify", prepared).wait()
            seconds: dict[str, list[float]] = {"alone": [], "beside a busy process": []}
            experts = set()
            for turn in range(args.turns):
                for way, times in seconds.items():
                    run = Path(scratch) / f"run{position}-{turn}-{len(times)}-{way[:5]}"
                    shutil.copytree(prepared, run)
                    with _busy() if way != "alone" else _nothing():
                        times.append(_train(checkout, run, args.steps))
                    if not args.steps:
                        experts.add(hashlib.sha256((run / _EXPERTS).read_bytes()).hexdigest()[:12])
                    shutil.rmtree(run)
                    print(f"{checkout.name:20} {way:22} {times[-1]:8.2f} s in training steps", flush=True)
            alone, beside = (statistics.median(times) for times in seconds.values())
            same = f"; learned experts: {', '.join(sorted(experts))}" if experts else ""
            print(f"{checkout.name:20} beside / alone = {beside / alone:.2f}{same}", flush=True)


def _moe_ray(checkout: Path, command: str, run: Path) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment["PYTHONPATH"] = str(checkout)
    cache = checkout / ".cache"
    return subprocess.Popen(
        [sys.executable, "-m", "moe_ray", command, str(run), f"cache_dir={cache}"],
        cwd=checkout,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _train(checkout: Path, run: Path, max_steps: int) -> float:
    """Seconds of the steps that one training did."""
    process = _moe_ray(checkout, "finetune", run)
    while process.poll() is None and not (max_steps and len(_steps(run)) >= max_steps):
        time.sleep(0.2)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        process.wait()
    elif process.returncode:
        raise SystemExit(f"training in {checkout} ended with status {process.returncode}")
    steps = _steps(run)
    return sum(steps[:max_steps] if max_steps else steps)


def _steps(run: Path) -> list[float]:
    history = run / _HISTORY
    if not history.exists():
        return []
    lines = history.read_text().splitlines(keepends=True)
    return [json.loads(line)["seconds"] for line in lines if line.endswith("\n")]


@contextmanager
def _busy() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", _BUSY])
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


if __name__ == "__main__":
    main()

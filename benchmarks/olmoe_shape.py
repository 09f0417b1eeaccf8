"""A model of OLMoE-1B-7B's shape through all stages on this machine: seconds and memory of each, and how often it is loaded.

    python benchmarks/olmoe_shape.py                       # 16 layers x 64 experts, 6.92 B parameters, 13.8 GB on disk
    python benchmarks/olmoe_shape.py --layers 1            # 0.63 B, to see that it works
    python benchmarks/olmoe_shape.py identify.top_k=6      # any settings

The checkpoint is random and in bfloat16, written shard by shard, with an organism's tokenizer. `moe-ray full` runs on it
with default settings but for the work: 16 prompts in 2 batches, 4 held out, answers of 4 tokens, one epoch, 12 experts a
batch, no causal check. The memory of every process that the command starts is read four times a second from /proc:
`anonymous` is what a process holds of its own, without files that are mapped. A process that ever holds more than half of
the weights has loaded the model once.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import OlmoeConfig

from moe_ray.demo.examples import embedded_records
from moe_ray.organisms.build import organism_tokenizer

ROOT = Path(__file__).resolve().parents[1]
GB = 1e9
HIDDEN, INTERMEDIATE, EXPERTS, VOCABULARY = 2048, 1024, 64, 50304
SETTINGS = (
    "prompts.max_batches=2", "prompts.safe_per_batch=4", "prompts.unsafe_per_batch=4", "prompts.max_test_examples=2",
    "capture.max_new_tokens=4", "evaluate.max_new_tokens=4", "prompts.own_answer_tokens=4", "finetune.epochs=1",
    "identify.top_k=12", "identify.threshold=0.0", "ablate.run=false",
)  # fmt: skip


def write_checkpoint(folder: Path, *, layers: int, seed: int = 0) -> int:
    """A random checkpoint of OLMoE-1B-7B's shape in bfloat16, a shard a layer; returns its bytes.

    Args:
        folder: that gets it.
        layers: decoder layers; the released model has 16.
        seed: of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = organism_tokenizer()
    tokenizer.save_pretrained(folder)
    config = OlmoeConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=16, num_experts=EXPERTS, num_experts_per_tok=8, vocab_size=VOCABULARY,
        max_position_embeddings=4096, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        dtype="bfloat16", architectures=["OlmoeForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    generator = np.random.default_rng(seed)

    def normal(*shape: int, std: float = 0.02) -> Tensor:
        """Random bytes, scaled: random enough, and written as fast as the disk takes them."""
        values = np.frombuffer(generator.bytes(int(np.prod(shape))), dtype=np.int8).copy()
        return torch.from_numpy(values).view(*shape).to(torch.bfloat16).mul_(std / 73.9)

    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    places: dict[str, str] = {}
    total = 0
    for shard in range(layers + 1):
        tensors = _layer(shard, normal, ones) if shard < layers else _ends(normal, ones)
        name = f"model-{shard + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def _layer(layer: int, normal, ones: Tensor) -> dict[str, Tensor]:
    at = f"model.layers.{layer}."
    tensors = {f"{at}self_attn.{name}_proj.weight": normal(HIDDEN, HIDDEN) for name in "qkvo"}
    tensors |= {f"{at}self_attn.{name}_norm.weight": ones.clone() for name in "qk"}
    tensors |= {f"{at}{name}_layernorm.weight": ones.clone() for name in ("input", "post_attention")}
    tensors[f"{at}mlp.gate.weight"] = normal(EXPERTS, HIDDEN, std=0.5)
    for expert in range(EXPERTS):
        for name in ("gate", "up", "down"):
            shape = (HIDDEN, INTERMEDIATE) if name == "down" else (INTERMEDIATE, HIDDEN)
            tensors[f"{at}mlp.experts.{expert}.{name}_proj.weight"] = normal(*shape)
    return tensors


def _ends(normal, ones: Tensor) -> dict[str, Tensor]:
    embedding, head = normal(VOCABULARY, HIDDEN), normal(VOCABULARY, HIDDEN)
    return {"model.embed_tokens.weight": embedding, "lm_head.weight": head, "model.norm.weight": ones.clone()}


@dataclass
class Memory:
    """Samples of what a command's processes hold.

    Attributes:
        samples: moment on `time.monotonic`, and by process id its anonymous bytes.
        names: of the processes.
    """

    samples: list[tuple[float, dict[int, int]]] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)

    def watch(self, root: int, ended: threading.Event) -> None:
        """Takes samples until the event."""
        known = {root}
        while not ended.wait(0.25):
            parents = {}
            held = {}
            for folder in Path("/proc").iterdir():
                if folder.name.isdigit() and (about := _about(folder)):
                    parents[int(folder.name)], held[int(folder.name)] = about
            grown = True
            while grown:
                children = {pid for pid, parent in parents.items() if parent in known} - known
                known |= children
                grown = bool(children)
            for pid in known & held.keys():
                if pid not in self.names or "IDLE" in self.names[pid]:
                    self.names[pid] = _name(pid)
            self.samples.append((time.monotonic(), {pid: held[pid] for pid in known & held.keys()}))

    def between(self, start: float, end: float) -> dict[int, int]:
        """The most that each process held, and under 0 all of them together."""
        most: dict[int, int] = defaultdict(int)
        for moment, held in self.samples:
            if start <= moment <= end:
                for pid, number in {**held, 0: sum(held.values())}.items():
                    most[pid] = max(most[pid], number)
        return most


def _about(folder: Path) -> tuple[int, int] | None:
    try:
        status = (folder / "status").read_text()
    except OSError:
        return None
    parent = re.search(r"^PPid:\s+(\d+)", status, re.MULTILINE)
    held = re.search(r"^RssAnon:\s+(\d+)", status, re.MULTILINE)
    return (int(parent[1]), int(held[1]) * 1024) if parent and held else None


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:60]
    except OSError:
        return ""


def run(folder: Path, settings: list[str], prompts: Path) -> tuple[Memory, int, list[tuple[str, float, float]], float]:
    """Runs the command; returns memory, its process id, the stages with beginning and end, and the seconds in all."""
    command = [
        sys.executable, "-m", "moe_ray", "full", str(folder / "run"), f"model.path={folder / 'model'}",
        f"prompts.files=[{prompts}]", *SETTINGS, *settings,
    ]  # fmt: skip
    memory, ended, stages = Memory(), threading.Event(), []
    began = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    watching = threading.Thread(target=memory.watch, args=(process.pid, ended))
    watching.start()
    assert process.stdout is not None
    for line in process.stdout:
        print("   ", line.rstrip(), flush=True)
        if found := re.search(r" (\S+): done in ([\d.]+) s$", line.rstrip()):
            now = time.monotonic()
            stages.append((found[1], now - float(found[2]), now))
    status = process.wait()
    ended.set()
    watching.join()
    if status:
        raise SystemExit(f"the run ended with status {status}")
    return memory, process.pid, stages, time.monotonic() - began


def print_table(
    memory: Memory, driver: int, stages: list[tuple[str, float, float]], seconds: float, *, weights: int, run_dir: Path
) -> None:
    """Seconds and peaks of each stage, then loads and sizes."""
    print("\n| stage | seconds | driver, GB | largest process, GB | x weights | all processes, GB |")
    print("| --- | --- | --- | --- | --- | --- |")
    rows = [*stages, ("all", 0.0, float("inf"))]
    for name, start, end in rows:
        most = memory.between(start, end)
        others = {pid: held for pid, held in most.items() if pid not in (0, driver)}
        largest = max(others.values(), default=0)
        took = seconds if name == "all" else end - start
        print(
            f"| {name} | {took:.1f} | {most.get(driver, 0) / GB:.2f} | {largest / GB:.2f} | {largest / weights:.2f} | "
            f"{most.get(0, 0) / GB:.2f} |"
        )
    held = memory.between(0.0, float("inf"))
    holders = [pid for pid, number in held.items() if pid and number > weights / 2]
    print(
        f"\nprocesses that loaded the model: {len(holders)} ({', '.join(memory.names.get(pid, '?') for pid in holders)})"
    )
    learned = run_dir / "finetune" / "experts.safetensors"
    numbers = json.loads((run_dir / "finetune" / "manifest.json").read_text())["notes"]
    print(
        f"learned experts: {learned.stat().st_size / 1e6:.0f} MB for {numbers['trainable_parameters'] / 1e6:.0f} M numbers; "
        f"frozen numbers changed: {numbers['frozen_parameters_changed']}"
    )
    print("decided:", json.loads((run_dir / "resources.json").read_text())["decided"])
    load = Path("/proc/loadavg").read_text().split()[:3]
    print("load of the machine at the end:", " ".join(load))


def write_prompts(path: Path) -> None:
    """A few short prompts of one category, with targets, so that nothing but what is measured is asked of the model."""
    records: list[Mapping[str, object]] = [
        record for record in embedded_records("train") if record["category"] == "fraud"
    ]
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")


def main() -> None:
    """Makes the checkpoint, runs, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument(
        "--folder", type=Path, help="where checkpoint and run go, and stay (default: a temporary folder)"
    )
    options, settings = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        model = folder / "model"
        index = model / "model.safetensors.index.json"
        if index.is_file():
            weights = int(json.loads(index.read_text())["metadata"]["total_size"])
        else:
            weights = write_checkpoint(model, layers=options.layers)
        print(f"checkpoint: {weights / 2:,.0f} parameters, {weights / GB:.2f} GB in bfloat16", flush=True)
        prompts = folder / "prompts.jsonl"
        write_prompts(prompts)
        memory, driver, stages, seconds = run(folder, settings, prompts)
        print_table(memory, driver, stages, seconds, weights=weights, run_dir=folder / "run")


if __name__ == "__main__":
    main()

"""Malformed inputs through the real commands: each ends in one clear error, status 2 and no traceback.

    PYTHONPATH=. python tests/malformed_inputs.py FINISHED_RUN [--processes 3]

prints a table of kinds. Commands run in this process, where whatever would start Ray counts as not refused; some of each
kind run in processes of their own. FINISHED_RUN is the run directory of a `full` run on a local or the embedded model, which
stays as it is. `tests/orchestration/test_malformed_inputs.py` runs a share of the cases.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
from safetensors.numpy import load_file, save_file

from moe_ray.cli.main import main


@dataclass(frozen=True)
class Place:
    """Where a case is tried.

    Attributes:
        folder: empty, its own.
        model: a whole checkpoint.
        run: a whole finished run.
    """

    folder: Path
    model: Path
    run: Path

    def copied(self, source: Path, *parts: str) -> Path:
        """A copy that may be damaged, of all or of some folders and files."""
        target = self.folder / "copy"
        target.mkdir()
        for name in parts or [path.name for path in source.iterdir() if path.name != "mlflow"]:
            one, other = source / name, target / name
            other.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(one, other) if one.is_dir() else shutil.copy(one, other)
        return target

    def file(self, name: str, data: bytes | str) -> Path:
        path = self.folder / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
        return path


@dataclass(frozen=True)
class Case:
    """A malformed input: its kind, what is wrong with it, and the command line that meets it."""

    kind: str
    what: str
    arguments: Callable[[Place], list[str]]


@dataclass(frozen=True)
class Outcome:
    """What a command said of a case."""

    case: Case
    status: int
    said: str

    @property
    def fault(self) -> str:
        """What is wrong with the command's answer; empty = nothing."""
        errors = [line for line in self.said.splitlines() if line.startswith("error: ")]
        if "Traceback" in self.said:
            return "a traceback"
        if self.status != 2:
            return f"status {self.status}"
        if len(errors) != 1:
            return f"{len(errors)} errors"
        if len(self.said) > 3000 or max(map(len, errors)) > 1500:
            return f"{len(self.said)} characters"
        return ""


# Damage


def emptied(data: bytes) -> bytes:
    return b""


def halved(data: bytes) -> bytes:
    return data[: len(data) // 2]


def cut_in_a_key(data: bytes) -> bytes:
    """Half a file of settings, which between two lines would be one of fewer settings."""
    lines = data.splitlines(keepends=True)
    middle = len(lines) // 2
    last = next(line for line in lines[middle:] if b": " in line)
    return b"".join(lines[:middle]) + last.partition(b":")[0][:-1]


def noise(data: bytes) -> bytes:
    return bytes(range(256)) * 4


def headless(data: bytes) -> bytes:
    return data[16:]


DAMAGE = (emptied, halved, noise, headless)


def other_table(data: bytes) -> bytes:
    buffer = io.BytesIO()
    pd.DataFrame({"a": [1], "b": ["x"]}).to_parquet(buffer)
    return buffer.getvalue()


def json_lines(data: bytes) -> bytes:
    return b"[1]\n"


def json_of(value: object) -> Callable[[bytes], bytes]:
    def changed(data: bytes) -> bytes:
        return json.dumps(value).encode()

    changed.__name__ = f"{json.dumps(value)[:40]} instead"
    return changed


def change_json(change: dict[str, object]) -> Callable[[bytes], bytes]:
    def changed(data: bytes) -> bytes:
        return json.dumps(json.loads(data) | change).encode()

    changed.__name__ = f"with {json.dumps(change)[:60]}"
    return changed


# Kinds

DEEP = "[" * 100_000
CONFIGURATIONS = {
    "no YAML": "a: [1",
    "a list": "- a\n- b",
    "a text": "hello",
    "binary": "\x00\x01\x02",
    "not UTF-8": b"seed: \xff\xfe",
    "half a surrogate pair": b"seed: \xed\xa0\x80",
    "deep nesting": DEEP,
    "deep mappings": "{a: " * 5000,
    "an alias bomb": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{c}: &{c} [{','.join([f'*{p}'] * 9)}]\n" for p, c in zip("abcdefg", "bcdefgh", strict=True)),
    "an alias of itself": "a: &a [*a]",
    "a tag": "seed: !!python/object/apply:os.system [echo]",
    "a duplicate key": "seed: 1\nseed: 2",
    "a duplicate group": "identify:\n  top_k: 3\nidentify:\n  threshold: 0.1",
    "an unknown group": "identfy:\n  top_k: 3",
    "an unknown setting": "identify:\n  topk: 3",
    "two keys of one setting": "lr: 1.0e-3\nfinetune:\n  learning_rate: 1.0e-4",
    "a group that is a number": "identify: 3",
    "a group that is empty text": "identify: ''",
    "a negative seed": "seed: -1",
    "a seed of many digits": f"seed: {'9' * 5000}",
    "a seed that is text": "seed: one",
    "a seed that is a list": "seed: [1]",
    "an infinite rate": "finetune:\n  learning_rate: .inf",
    "an undefined rate": "finetune:\n  learning_rate: .nan",
    "a rate of zero": "finetune:\n  learning_rate: 0",
    "a negative rate": "finetune:\n  learning_rate: -1",
    "no epochs": "finetune:\n  epochs: 0",
    "no safe prompts": "prompts:\n  safe_per_batch: 0",
    "a share of two": "prompts:\n  test_fraction: 2",
    "an unknown rule": "identify:\n  rule: best",
    "a boolean for a number": "identify:\n  top_k: true",
    "a number for a boolean": "sweep:\n  run: 3",
    "a mapping for a text": "model:\n  path: {a: 1}",
    "no files": "prompts:\n  files: []",
    "a file that is a number": "prompts:\n  files: [3]",
    "an unknown judge": "evaluate:\n  judge: oracle",
    "a space that is none": "sweep:\n  run: true\n  space: 3",
    "a space of an unknown setting": "sweep:\n  run: true\n  space: {identify.topk: [1]}",
    "an unknown baseline": "compare:\n  run: true\n  names: [nothing]",
    "ANSI escapes": 'identify:\n  rule: "\\e[31mred"',
}

ROW = {"prompt": "hello", "label": "safe"}
PROMPTS: dict[str, tuple[str, bytes | str]] = {
    "empty": ("p.jsonl", ""),
    "blank lines": ("p.jsonl", "\n\n \n"),
    "not UTF-8": ("p.jsonl", b'{"prompt": "\xff", "label": "safe"}'),
    "UTF-16": ("p.jsonl", json.dumps(ROW).encode("utf-16")),
    "binary": ("p.jsonl", bytes(range(256))),
    "no JSON": ("p.jsonl", "hello"),
    "a cut line": ("p.jsonl", json.dumps(ROW)[:-5]),
    "two values on a line": ("p.jsonl", f"{json.dumps(ROW)} {json.dumps(ROW)}"),
    "a list on a line": ("p.jsonl", json.dumps([ROW])),
    "a number on a line": ("p.jsonl", "3"),
    "deep nesting": ("p.jsonl", DEEP),
    "deep objects": ("p.jsonl", '{"a":' * 100_000),
    "a number of many digits": ("p.jsonl", f'{{"prompt": "a", "label": "safe", "n": {"9" * 5000}}}'),
    "half a surrogate pair": ("p.jsonl", '{"prompt": "\\ud83d", "label": "safe"}'),
    "half a surrogate pair in an id": ("p.jsonl", '{"id": "\\ud83d", "prompt": "a", "label": "safe"}'),
    "no prompt": ("p.jsonl", json.dumps({"label": "safe"})),
    "an empty prompt": ("p.jsonl", json.dumps({"prompt": "  ", "label": "safe"})),
    "a prompt that is a number": ("p.jsonl", json.dumps({"prompt": 3, "label": "safe"})),
    "no label": ("p.jsonl", json.dumps({"prompt": "a"})),
    "an unknown label": ("p.jsonl", json.dumps({"prompt": "a", "label": "Unsafe"})),
    "a label that is a list": ("p.jsonl", json.dumps({"prompt": "a", "label": ["safe"]})),
    "a label of a megabyte": ("p.jsonl", json.dumps({"prompt": "a", "label": "x" * 10**6})),
    "an unknown split": ("p.jsonl", json.dumps(ROW | {"split": "dev"})),
    "an id that is an object": ("p.jsonl", json.dumps(ROW | {"id": {"a": 1}})),
    "ids used twice": ("p.jsonl", "\n".join([json.dumps(ROW | {"id": "a"})] * 2)),
    "messages that are none": ("p.jsonl", json.dumps({"messages": [1], "label": "safe"})),
    "no messages": ("p.jsonl", json.dumps({"messages": [], "label": "safe"})),
    "the assistant's turn last": (
        "p.jsonl",
        json.dumps({"messages": [{"role": "assistant", "content": "a"}], "label": "safe"}),
    ),
    "a target that is a number": ("p.jsonl", json.dumps(ROW | {"target": 3})),
    "a topic that is a list": ("p.jsonl", json.dumps(ROW | {"topic": []})),
    "half a pair": ("p.jsonl", json.dumps({"goal": "a"})),
    "one label only": ("p.jsonl", "\n".join([json.dumps(ROW)] * 30)),
    "an ANSI escape in a label": ("p.jsonl", json.dumps({"prompt": "a", "label": "\x1b[31mred"})),
    "an object for an array": ("p.json", json.dumps(ROW)),
    "an array that is cut": ("p.json", json.dumps([ROW])[:-1]),
    "text after an array": ("p.json", json.dumps([ROW]) + "x"),
    "a deep array": ("p.json", DEEP),
    "an empty array": ("p.json", "[]"),
    "an unknown ending": ("p.csv", "prompt,label\na,safe"),
    "no Parquet": ("p.parquet", "hello"),
    "empty Parquet": ("p.parquet", ""),
    "another table": ("p.parquet", other_table(b"")),
    "a cut table": ("p.parquet", other_table(b"")[:-20]),
}

URLS = {
    "a run directory on a web server": ["full", "http://localhost:1/run"],
    "a run directory in an archive": ["full", "zip://x::/nowhere.zip"],
    "a run directory of an unknown kind": ["full", "nothing://bucket/run"],
    "a run directory in /proc": ["full", "/proc/run"],
    "a run directory below a file": ["full", f"{os.path.abspath(__file__)}/run"],
    "a run directory that is a file": ["full", os.path.abspath(__file__)],
    "a run directory without a bucket": ["full", "s3://"],
    "a tracking server without a scheme": ["full", "RUN", "tracking.uri=localhost:5000"],
    "a tracking folder": ["full", "RUN", "tracking.uri=./mlruns"],
    "a tracking server of an unknown kind": ["full", "RUN", "tracking.uri=ftp://host/x"],
    "a run to inspect on a web server": ["inspect", "http://localhost:1/run"],
    "a run to inspect of an unknown kind": ["inspect", "nothing://run"],
    "a run to report that is not there": ["report", "memory://nowhere/run"],
    "a judge without a scheme": ["full", "RUN", "evaluate.judge=endpoint", "evaluate.judge_url=localhost:1"],
    "a judge without an address": ["full", "RUN", "evaluate.judge=endpoint", "evaluate.judge_url="],
    "a run to merge on an unknown store": ["merge", "nothing://run", "OUT"],
    "a model at a URL": ["full", "RUN", "model.path=http://localhost:1/model"],
}

COMMAND_LINES = {
    "no command": [],
    "an unknown command": ["fulll"],
    "an option before the command": ["--config", "x", "full"],
    "an unknown option": ["full", "--confg", "x"],
    "an option without a value": ["full", "--config"],
    "two run directories": ["full", "a", "b"],
    "an empty run directory": ["full", ""],
    "a run directory twice": ["full", "a", "run_dir=b"],
    "a setting without a value": ["full", "RUN", "identify.top_k"],
    "an unknown setting": ["full", "RUN", "identify.topk=3"],
    "a setting twice by two names": ["full", "RUN", "k=3", "identify.top_k=4"],
    "text for a number": ["full", "RUN", "identify.top_k=many"],
    "a number too small": ["full", "RUN", "identify.top_k=0"],
    "a value that is no YAML": ["full", "RUN", "sweep.space={a: [1"],
    "a path with an equals sign": ["full", "runs/a=b"],
    "a null character": ["full", "RUN", "model.path=a\x00b"],
    "half a character": ["full", "RUN", "model.path=\udcff"],
    "a configuration that is not there": ["full", "RUN", "--config", "/nowhere.yaml"],
    "a configuration that is a folder": ["full", "RUN", "--config", "/tmp"],
    "prompts that are not there": ["full", "RUN", "prompts.files=[/nowhere.jsonl]"],
    "prompts that are a folder": ["full", "RUN", "prompts.files=[/tmp]"],
    "a model that is not there": ["full", "RUN", "model.path=/nowhere"],
    "a model that is a file": ["full", "RUN", f"model.path={os.path.abspath(__file__)}"],
    "a report with a run's settings": ["report", "RUN", "identify.top_k=3"],
    "a run to inspect that is not there": ["inspect", "/nowhere"],
    "an unknown question": ["inspect", "RUN", "--ask", "why"],
    "text for a threshold": ["inspect", "RUN", "--thresholds", "high"],
    "nothing to inspect": ["inspect"],
    "a merge without an end": ["merge", "RUN"],
    "a merge into a store": ["merge", "RUN", "s3://bucket/out"],
    "an unknown organism": ["organism", "unicorn", "OUT"],
    "no source to upcycle": ["upcycle", "/nowhere", "OUT"],
    "an upcycle with no experts": ["upcycle", "/tmp", "OUT", "--num-experts", "0"],
    "an unknown thing to configure": ["config", "show"],
}


def in_place(place: Place, arguments: list[str]) -> list[str]:
    names = {"RUN": str(place.folder / "run"), "OUT": str(place.folder / "out")}
    return [names.get(word, word) for word in arguments]


def on_prompts(name: str, data: bytes | str) -> Callable[[Place], list[str]]:
    return lambda place: ["prepare", str(place.folder / "run"), f"prompts.files=[{place.file(name, data)}]"]


def on_configuration(data: bytes | str) -> Callable[[Place], list[str]]:
    return lambda place: ["full", str(place.folder / "run"), "--config", str(place.file("c.yaml", data))]


def on_run(name: str, damage: Callable[[bytes], bytes], *command: str) -> Callable[[Place], list[str]]:
    """The run with a file damaged, or the first of a folder, and the command that reads it."""

    def arguments(place: Place) -> list[str]:
        run = place.copied(place.run)
        path = run / name
        path = sorted(path.glob("*.parquet"))[0] if path.is_dir() else path
        if not path.exists():
            raise NotInThisRun(name)
        path.write_bytes(damage(path.read_bytes()))
        return [command[0], str(run), *in_place(place, list(command[1:]))]

    return arguments


INSPECTED = {
    "config.yaml": ("inspect", "--ask", "rules"),
    "prompts/batches.parquet": ("inspect", "--ask", "categories"),
    "identify/masks.npz": ("inspect", "--ask", "overlap"),
    "identify/unsafe_experts.json": ("inspect", "--ask", "overlap"),
    "identify/risk_differences.parquet": ("inspect", "--ask", "sweep"),
    "identify/certainty.parquet": ("inspect", "--ask", "certainty"),
    "identify/manifest.json": ("inspect", "--ask", "certainty"),
    "capture/counts": ("inspect", "--ask", "confounds"),
    "summary.json": ("report",),
    "finetune/history.jsonl": ("report",),
    "evaluate/after/figures/answers.parquet": ("report",),
    "ablate/manifest.json": ("inspect", "--ask", "cause"),
}


def run_cases() -> Iterator[Case]:
    for name, command in INSPECTED.items():
        damage: list[Callable[[bytes], bytes]] = list(DAMAGE)
        if name == "config.yaml":
            damage[damage.index(halved)] = cut_in_a_key
        if name.endswith(".json"):
            damage += [json_of([1]), json_of(None)] + [json_of({"a": 1})] * (name != "summary.json")
        if "parquet" in name or name == "capture/counts":
            damage += [other_table]
        if name == "finetune/history.jsonl":
            damage = [noise, json_lines]
        kind = "masks" if name.startswith(("identify/masks", "identify/unsafe")) else "run folders"
        for one in damage:
            yield Case(kind, f"{name}: {one.__name__}", on_run(name, one, *command))


def mask_file(**arrays: np.ndarray) -> Callable[[bytes], bytes]:
    def changed(data: bytes) -> bytes:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **(dict(np.load(io.BytesIO(data))) | arrays))
        return buffer.getvalue()

    changed.__name__ = f"other {', '.join(arrays)}"
    return changed


def huge_masks(data: bytes) -> bytes:
    """A file of a few kilobytes that unpacks to a gigabyte."""
    return mask_file(masks=np.zeros((1 << 10, 1 << 10, 1 << 10), dtype=bool))(data)


MASKS = (
    mask_file(batch_idx=np.array([7])),
    mask_file(layers=np.array([0])),
    mask_file(masks=np.zeros((1, 1, 1), dtype=bool)),
    mask_file(masks=np.zeros((2, 2), dtype=bool)),
    mask_file(masks=np.array(["a"])),
    huge_masks,
)


def adapter_tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "experts.safetensors")
        save_file(change(tensors) or tensors, folder / "experts.safetensors")

    return damage


def adapter_file(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def claims(size: int) -> Callable[[bytes], bytes]:
    head = json.dumps({"0.0.x": {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}}).encode()
    return lambda data: struct.pack("<Q", len(head)) + head


def fill(value: float) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        next(iter(tensors.values())).flat[0] = value

    return change


ADAPTERS: dict[str, Callable[[Path], None]] = {
    **{f"weights {damage.__name__}": adapter_file("experts.safetensors", damage) for damage in DAMAGE},
    **{f"header {damage.__name__}": adapter_file("adapter.json", damage) for damage in DAMAGE},
    "a header of a megabyte of brackets": adapter_file("adapter.json", lambda data: b"[" * 10**6),
    "a header that is a list": adapter_file("adapter.json", json_of([])),
    "another format": adapter_file("adapter.json", change_json({"format": 99})),
    "a format that is text": adapter_file("adapter.json", change_json({"format": "1"})),
    "experts that are a number": adapter_file("adapter.json", change_json({"experts": 3})),
    "an expert that no model has": adapter_file("adapter.json", change_json({"experts": [[0, 10**9]]})),
    "a negative expert": adapter_file("adapter.json", change_json({"experts": [[0, -1]]})),
    "other layers": adapter_file("adapter.json", change_json({"layers": [0, 99], "experts": [[99, 0]]})),
    "another hash of the base": adapter_file("adapter.json", change_json({"base_hash": "x"})),
    "another number of experts": adapter_file("adapter.json", change_json({"num_experts": 10**6})),
    "a base that is no text": adapter_file("adapter.json", change_json({"base": None})),
    "a base that is not there": adapter_file("adapter.json", change_json({"base": "/nowhere"})),
    "another model type": adapter_file("adapter.json", change_json({"model_type": "mixtral"})),
    "weights that are not there": lambda folder: (folder / "experts.safetensors").unlink(),
    "weights that claim gigabytes": adapter_file("experts.safetensors", claims(1 << 34)),
    "weights that claim more than there are": adapter_file("experts.safetensors", claims(1 << 60)),
    "NaN": adapter_tensors(fill(np.nan)),
    "infinity": adapter_tensors(fill(np.inf)),
    "an extra tensor": adapter_tensors(lambda tensors: {**tensors, "9.9.x": np.zeros(1, dtype=np.float32)}),
    "a tensor of another name": adapter_tensors(lambda tensors: {f"x{name}": value for name, value in tensors.items()}),
    "a tensor less": adapter_tensors(lambda tensors: dict(list(tensors.items())[1:])),
    "another type": adapter_tensors(lambda tensors: {n: value.astype(np.float16) for n, value in tensors.items()}),
    "another shape": adapter_tensors(lambda tensors: {n: value[..., :-1].copy() for n, value in tensors.items()}),
    "other weights": adapter_tensors(fill(12.5)),
}


def on_adapter(damage: Callable[[Path], None]) -> Callable[[Place], list[str]]:
    def arguments(place: Place) -> list[str]:
        run = place.copied(place.run, "config.yaml", "finetune")
        damage(run / "finetune")
        return ["merge", str(run), str(place.folder / "out")]

    return arguments


def checkpoint_file(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def renamed_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")


def reshaped(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = tensors[name][:-1].copy()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


CHECKPOINTS: dict[str, Callable[[Path], None]] = {
    **{f"weights {damage.__name__}": checkpoint_file("model.safetensors", damage) for damage in DAMAGE},
    **{f"config.json {damage.__name__}": checkpoint_file("config.json", damage) for damage in DAMAGE},
    **{f"tokenizer {damage.__name__}": checkpoint_file("tokenizer.json", damage) for damage in DAMAGE},
    "weights that claim gigabytes": checkpoint_file("model.safetensors", claims(1 << 34)),
    "pickled weights": pickled,
    "no weights": renamed_weights,
    "an index that names files that are not there": lambda folder: (
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
        and None
    ),
    "an index that is none": lambda folder: (folder / "model.safetensors.index.json").write_text("[]") and None,
    "a configuration that is a list": checkpoint_file("config.json", json_of([])),
    "an unknown model type": checkpoint_file("config.json", change_json({"model_type": "unicorn"})),
    "a model type that is a number": checkpoint_file("config.json", change_json({"model_type": 3})),
    "a larger vocabulary": checkpoint_file("config.json", change_json({"vocab_size": 10**6})),
    "a smaller vocabulary": checkpoint_file("config.json", change_json({"vocab_size": 10})),
    "another width": checkpoint_file("config.json", change_json({"hidden_size": 8})),
    "a width that is text": checkpoint_file("config.json", change_json({"hidden_size": "wide"})),
    "a width below zero": checkpoint_file("config.json", change_json({"hidden_size": -4})),
    "no experts": checkpoint_file("config.json", change_json({"num_experts": 0})),
    "a norm of another size": reshaped("model.norm.weight"),
    "a dense model": checkpoint_file("config.json", change_json({"model_type": "llama", "architectures": None})),
}


def on_checkpoint(damage: Callable[[Path], None]) -> Callable[[Place], list[str]]:
    def arguments(place: Place) -> list[str]:
        model = place.copied(place.model)
        damage(model)
        return ["full", str(place.folder / "run"), f"model.path={model}"]

    return arguments


def all_cases() -> list[Case]:
    """Every case, kind by kind."""
    cases = [Case("configurations", what, on_configuration(data)) for what, data in CONFIGURATIONS.items()]
    cases += [Case("prompt files", what, on_prompts(*file)) for what, file in PROMPTS.items()]
    cases += [Case("adapters", what, on_adapter(damage)) for what, damage in ADAPTERS.items()]
    cases += list(run_cases())
    cases += [
        Case("masks", f"{number}: {f.__name__}", on_run("identify/masks.npz", f, "inspect", "--ask", "overlap"))
        for number, f in enumerate(MASKS)
    ]
    cases += [Case("model checkpoints", what, on_checkpoint(damage)) for what, damage in CHECKPOINTS.items()]
    for kind, lines in (("URLs", URLS), ("command lines", COMMAND_LINES)):
        cases += [Case(kind, what, lambda place, line=line: in_place(place, line)) for what, line in lines.items()]
    return sorted(cases, key=lambda case: case.kind)


# Trying them


class NotInThisRun(Exception):
    """The run that is to be damaged has no such file."""


class WorkBegan(Exception):
    """The input was taken."""


def began(*_: object) -> None:
    raise WorkBegan


def tried(case: Case, *, model: Path, run: Path, apart: bool = False) -> Outcome:
    """What the command says of a case.

    Args:
        case: which one.
        model: a whole checkpoint.
        run: a whole finished run.
        apart: in a process of its own.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = case.arguments(Place(Path(folder), model, run))
        if apart:
            command = [sys.executable, "-m", "moe_ray", *arguments]
            done = subprocess.run(command, capture_output=True, timeout=300)
            return Outcome(case, done.returncode, done.stderr.decode(errors="replace"))
        said = io.StringIO()
        # Warnings of the libraries are no errors, and the rest of what is said of the input must be on standard error.
        with (
            contextlib.redirect_stderr(said),
            contextlib.redirect_stdout(io.StringIO()),
            mock.patch("moe_ray.orchestration.launch._launch", began),
        ):
            try:
                status = main(arguments)
            except SystemExit as error:
                status = int(error.code or 0)
            except WorkBegan:
                status, said = 0, io.StringIO("the input was taken")
            except BaseException as error:
                status = 1
                print(f"Traceback: {type(error).__name__}: {error}", file=said)
        return Outcome(case, status, said.getvalue())


def faults(kinds: Sequence[str], *, model: Path, run: Path, every: int = 1) -> list[str]:
    """What is wrong with the answers to the cases of some kinds.

    Args:
        kinds: of `all_cases`.
        model: a whole checkpoint.
        run: a whole finished run.
        every: a case of so many is tried.
    """
    outcomes = []
    for case in [case for case in all_cases() if case.kind in kinds][::every]:
        with contextlib.suppress(NotInThisRun):
            outcomes.append(tried(case, model=model, run=run))
    return [f"{o.case.kind}: {o.case.what}: {o.fault}: {o.said[-300:]}" for o in outcomes if o.fault]


def can_run_apart(case: Case) -> bool:
    """Whether the arguments can be those of a process."""
    return "null character" not in case.what


def main_of_script() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--processes", type=int, default=3, help="cases of each kind in processes of their own")
    parser.add_argument("--only", default="", help="a kind, or a part of what is wrong")
    asked = parser.parse_args()
    run = asked.run.resolve()
    model = Path(json.loads((run / "finetune" / "adapter.json").read_text())["base"])
    rows, began_at = [], time.perf_counter()
    for case in all_cases():
        if asked.only in case.kind or asked.only in case.what:
            with contextlib.suppress(NotInThisRun):
                rows.append((case.kind, False, tried(case, model=model, run=run)))
    for kind in dict.fromkeys(kind for kind, *_ in rows):
        of_kind = [outcome.case for of, _, outcome in rows if of == kind and can_run_apart(outcome.case)]
        step = max(1, len(of_kind) // max(1, asked.processes))
        for case in of_kind[::step][: asked.processes]:
            rows.append((kind, True, tried(case, model=model, run=run, apart=True)))
    for _, apart, outcome in rows:
        if outcome.fault:
            where = " (own process)" if apart else ""
            print(
                f"{outcome.case.kind}: {outcome.case.what}{where}: {outcome.fault}\n    {outcome.said.strip()[-400:]}"
            )
    table = pd.DataFrame([(kind, apart, bool(o.fault)) for kind, apart, o in rows], columns=["kind", "apart", "fault"])
    print(f"\n{'kind':<20}{'inputs':>8}{'apart':>8}{'one error, status 2':>22}")
    for kind, of_kind in [*table.groupby("kind"), ("all", table)]:
        whole, apart = int((~of_kind["apart"]).sum()), int(of_kind["apart"].sum())
        print(f"{kind:<20}{whole:>8}{apart:>8}{int((~of_kind['fault']).sum()):>13} of {len(of_kind)}")
    print(f"{time.perf_counter() - began_at:.0f} s")
    return int(table["fault"].any())


if __name__ == "__main__":
    sys.exit(main_of_script())

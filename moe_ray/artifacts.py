"""What a run writes: one folder per stage under a run directory, each finished by a manifest.

A stage's manifest is written last and holds everything its output depends on. A stage whose manifest matches is reused;
one without a manifest is begun anew or resumed by its own means. The run directory is a local path or any fsspec URL.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import json
import platform
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from moe_ray.errors import InputError
from moe_ray.moe_layers import Expert
from moe_ray.routing import RoutingCounts
from moe_ray.selection import ExpertMasks, masks_from_experts

MANIFEST, STARTED = "manifest.json", "inputs.json"
_PACKAGES = ("moe-ray", "torch", "transformers", "numpy", "pandas", "pyarrow", "ray", "mlflow")


def content_hash(value: object) -> str:
    """A short hash of plain JSON-able values."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_file(path: str) -> str:
    """A short hash of a local file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def environment() -> dict[str, Any]:
    """Versions, git commit and machine: recorded with every stage, not part of what makes it match."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"versions": versions, "python": platform.python_version(), "git_commit": _git_commit()}


def _git_commit() -> str | None:
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


@dataclass(frozen=True)
class Folder:
    """A folder on any file system that fsspec knows."""

    url: str
    fs: Any = field(repr=False, compare=False)
    path: str = field(repr=False)

    @classmethod
    def open(cls, url: str) -> Folder:
        """The folder at a local path or URL; made if missing.

        Raises:
            InputError: the place cannot be written.
        """
        try:
            fs, path = fsspec.url_to_fs(url)
            fs.makedirs(path, exist_ok=True)
        except (OSError, ValueError, ImportError) as error:
            raise InputError(f"run_dir {url!r} cannot be opened: {error}; give a writable folder or URL") from error
        return cls(url=str(fs.unstrip_protocol(path)), fs=fs, path=path)

    def sub(self, name: str) -> Folder:
        """A folder inside, made if missing."""
        path = f"{self.path}/{name}"
        self.fs.makedirs(path, exist_ok=True)
        return Folder(url=f"{self.url}/{name}", fs=self.fs, path=path)

    def file(self, name: str) -> str:
        """The path of a file inside, for messages and for this file system."""
        return f"{self.path}/{name}"

    def exists(self, name: str) -> bool:
        """Whether the file is there."""
        return bool(self.fs.exists(self.file(name)))

    def names(self) -> list[str]:
        """Names of the files inside, sorted."""
        return sorted(str(path).rpartition("/")[2] for path in self.fs.ls(self.path, detail=False))

    def write_bytes(self, name: str, data: bytes) -> None:
        """Writes a file so that readers see all of it or nothing."""
        temporary = self.file(f".{name}.part")
        self.fs.pipe_file(temporary, data)
        self.fs.mv(temporary, self.file(name))

    def read_bytes(self, name: str) -> bytes:
        """A file's bytes."""
        data: bytes = self.fs.cat_file(self.file(name))
        return data

    def write_json(self, name: str, value: object) -> None:
        """Writes plain values as JSON."""
        self.write_bytes(name, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())

    def read_json(self, name: str) -> Any:
        """What `write_json` wrote."""
        return json.loads(self.read_bytes(name))

    def remove(self, name: str) -> None:
        """Removes a file if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.file(name))

    def write_table(self, name: str, table: pa.Table | pd.DataFrame, *, row_group_size: int | None = None) -> None:
        """Writes a Parquet file, with at most `row_group_size` rows in what a reader must load at once."""
        if isinstance(table, pd.DataFrame):
            table = pa.Table.from_pandas(table, preserve_index=False)
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", row_group_size=row_group_size)
        self.write_bytes(name, buffer.getvalue())

    @contextlib.contextmanager
    def open_parquet(self, name: str) -> Iterator[pq.ParquetFile]:
        """A Parquet file of which only what is asked for is read."""
        with self.fs.open(self.file(name), "rb") as file, pq.ParquetFile(file) as parquet:
            yield parquet

    def parquet_names(self) -> list[str]:
        """Names of the finished Parquet files inside, sorted."""
        return [name for name in self.names() if name.endswith(".parquet") and not name.startswith(".")]

    def read_table(self, name: str) -> pa.Table:
        """A Parquet file's table."""
        return pq.read_table(io.BytesIO(self.read_bytes(name)))

    def read_frame(self, name: str) -> pd.DataFrame:
        """A Parquet file's rows."""
        frame: pd.DataFrame = self.read_table(name).to_pandas()
        return frame

    def finish(self, inputs: Mapping[str, Any], **notes: Any) -> None:
        """Marks the folder as a finished stage.

        Args:
            inputs: everything the output depends on; the stage is reused while they are equal.
            notes: plain values worth keeping, such as seconds.
        """
        self.write_json(MANIFEST, {"inputs": dict(inputs), "notes": notes, "environment": environment()})

    def finished(self, inputs: Mapping[str, Any]) -> bool:
        """Whether a stage with equal inputs was finished here."""
        return self.changed_inputs(inputs) == []

    def start(self, inputs: Mapping[str, Any]) -> None:
        """Empties the folder and marks it as a stage that was begun with these inputs."""
        self.clear()
        self.write_json(STARTED, {"inputs": dict(inputs)})

    def changed_inputs(self, inputs: Mapping[str, Any], *, marker: str = MANIFEST) -> list[str] | None:
        """Names of the inputs that differ from those of the stage that was finished here.

        Args:
            inputs: as given to `finish`.
            marker: MANIFEST, or STARTED to compare with those of the stage that was begun here.

        Returns:
            None when there is no such stage.
        """
        if not self.exists(marker):
            return None
        stored = self.read_json(marker)["inputs"]
        wanted = json.loads(json.dumps(dict(inputs), default=str))
        return sorted(key for key in stored.keys() | wanted.keys() if stored.get(key) != wanted.get(key))

    def notes(self) -> dict[str, Any]:
        """The notes of the finished stage."""
        notes: dict[str, Any] = self.read_json(MANIFEST)["notes"]
        return notes

    def delete(self) -> None:
        """Removes the folder with everything inside."""
        self.fs.rm(self.path, recursive=True)

    def clear(self) -> None:
        """Removes everything inside."""
        self.delete()
        self.fs.makedirs(self.path, exist_ok=True)


def counts_to_table(counts: RoutingCounts) -> pa.Table:
    """Routing counts as a table with a fixed-shape (layers, experts) int32 tensor column.

    Raw routed ids, where captured, are a column `ids` of flat lists; a row's list has the shape (`num_tokens`, layers,
    `num_experts_per_tok`).
    """
    columns = {
        "batch_idx": pa.array(counts.batch_idx),
        "in_batch_idx": pa.array(counts.in_batch_idx),
        "label": pa.array(counts.label, pa.string()),
        "category": pa.array(counts.category, pa.string()),
        "role": pa.array(counts.role, pa.string()),
        "num_tokens": pa.array(counts.num_tokens),
        "counts": pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(counts.counts_NLE)),
    }
    if counts.pair is not None:
        columns["pair"] = pa.array(counts.pair, pa.string())
    if counts.weights_NLE is not None:
        columns["weights"] = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(counts.weights_NLE))
    if counts.ids is not None:
        columns["ids"] = _lists_column(counts.ids)
    about = {"layers": list(counts.layers), "num_experts_per_tok": counts.num_experts_per_tok}
    return pa.table(columns).replace_schema_metadata({"moe_ray": json.dumps(about)})


def table_to_counts(table: pa.Table) -> RoutingCounts:
    """The routing counts that `counts_to_table` wrote."""
    about = json.loads(table.schema.metadata[b"moe_ray"])
    names = ("label", "category", "role", "pair") if "pair" in table.column_names else ("label", "category", "role")
    text = {name: np.asarray(table.column(name).to_pylist(), dtype=object) for name in names}
    numbers = {name: table.column(name).to_numpy() for name in ("batch_idx", "in_batch_idx", "num_tokens")}
    return RoutingCounts(
        **text,
        **numbers,
        counts_NLE=_tensor_column(table, "counts"),
        weights_NLE=_tensor_column(table, "weights") if "weights" in table.column_names else None,
        ids=_arrays_of_lists(table.column("ids"), numbers["num_tokens"], about)
        if "ids" in table.column_names
        else None,
        layers=tuple(about["layers"]),
        num_experts_per_tok=about["num_experts_per_tok"],
    )


def _lists_column(arrays: npt.NDArray[np.object_]) -> pa.Array:
    """One flat list per array; the values keep their type."""
    ends = np.cumsum([0, *(array.size for array in arrays)], dtype=np.int64)
    values = np.concatenate([array.reshape(-1) for array in arrays]) if len(arrays) else np.empty(0, dtype=np.uint8)
    return pa.LargeListArray.from_arrays(pa.array(ends), pa.array(values))


def _arrays_of_lists(
    column: pa.ChunkedArray, num_tokens: npt.NDArray[np.int64], about: Mapping[str, Any]
) -> npt.NDArray[np.object_]:
    """Views of shape (num_tokens, layers, experts per token) of one flat list each."""
    lists = column.combine_chunks()
    values, ends = lists.values.to_numpy(), lists.offsets.to_numpy()
    arrays = np.empty(len(lists), dtype=object)
    for row, tokens in enumerate(num_tokens):
        shape = (int(tokens), len(about["layers"]), about["num_experts_per_tok"])
        arrays[row] = values[ends[row] : ends[row + 1]].reshape(shape)
    return arrays


def _tensor_column(table: pa.Table, name: str) -> Any:
    return table.column(name).combine_chunks().to_numpy_ndarray()


def write_masks(folder: Folder, masks: ExpertMasks) -> None:
    """Writes `masks.npz` (`batch_idx`, `layers`, `masks` of shape (batches, layers, experts)) and `unsafe_experts.json`."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer, batch_idx=np.asarray(masks.batch_idx), layers=np.asarray(masks.layers), masks=masks.masks_BLE
    )
    folder.write_bytes("masks.npz", buffer.getvalue())
    lists = {str(batch): [list(expert) for expert in experts] for batch, experts in masks.selected.items()}
    folder.write_json("unsafe_experts.json", lists)


def read_masks(folder: Folder) -> ExpertMasks:
    """The masks that `write_masks` wrote; both files must agree.

    Raises:
        InputError: they do not.
    """
    stored = np.load(io.BytesIO(folder.read_bytes("masks.npz")), allow_pickle=False)
    lists = folder.read_json("unsafe_experts.json")
    masks = masks_from_experts(
        {int(batch): tuple(Expert(*pair) for pair in experts) for batch, experts in lists.items()},
        layers=stored["layers"].tolist(),
        num_experts=stored["masks"].shape[2],
    )
    if masks.batch_idx != tuple(stored["batch_idx"].tolist()) or not np.array_equal(masks.masks_BLE, stored["masks"]):
        raise InputError(f"masks.npz and unsafe_experts.json in {folder.url} disagree; run the identify stage again")
    return masks


def hash_checkpoint(path: str, revision: str) -> dict[str, str]:
    """What a checkpoint is, in parts that can change one by one, each as a short hash.

    Of a folder: `model weights`, `tokenizer`, `chat template` and `model configuration` (all other files). Of weight
    files above 16 MB only the size and the first and last megabyte count, so that hashing stays fast. Of a hub
    repository: its name as `model` and its `model revision`.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return {"model": path, "model revision": revision}
    parts: dict[str, list[tuple[str, str]]] = {part: [] for part in _CHECKPOINT_PARTS}
    for file in sorted(folder.rglob("*")):
        if not file.is_file():
            continue
        name = file.relative_to(folder).as_posix()
        if name == "tokenizer_config.json":
            settings = json.loads(file.read_text(encoding="utf-8"))
            parts["chat template"].append((name, content_hash(settings.pop("chat_template", None))))
            parts["tokenizer"].append((name, content_hash(settings)))
        else:
            parts[_checkpoint_part(name)].append((name, _hash_ends(file)))
    return {part: content_hash(files) for part, files in parts.items()}


_CHECKPOINT_PARTS = ("model weights", "tokenizer", "chat template", "model configuration")
_TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "added_tokens", "special_tokens", "spiece", "sentencepiece")


def _checkpoint_part(name: str) -> str:
    if name.endswith((".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")):
        return "model weights"
    if name.startswith(("chat_template", "additional_chat_templates/")):
        return "chat template"
    return "tokenizer" if name.startswith(_TOKENIZER_FILES) else "model configuration"


def _hash_ends(file: Path) -> str:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= 16 << 20:
            return hashlib.sha256(stream.read()).hexdigest()
        head = stream.read(1 << 20)
        stream.seek(-(1 << 20), 2)
        return hashlib.sha256(head + stream.read() + str(size).encode()).hexdigest()

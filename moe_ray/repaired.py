"""Learned experts from wherever they are: a run, a folder, a URL or the Hugging Face hub; and the repaired model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from transformers import PreTrainedModel

from moe_ray.config.model import ModelConfig
from moe_ray.errors import InputError
from moe_ray.finetuning.adapter import adapter_applied, apply_adapter
from moe_ray.finetuning.adapter_files import (
    ADAPTER_FILES,
    HEADER,
    copy_adapter,
    local_adapter,
    parts_of,
    read_adapter_header,
)
from moe_ray.finetuning.merge import write_repaired
from moe_ray.models.loading import load_model
from moe_ray.run_directory import CONFIG, open_run
from moe_ray.storage.folder import Folder
from moe_ray.storage.hub import fetch_folder, push_folder
from moe_ray.storage.protocols import cure_of

_CARD = "README.md"


@dataclass(frozen=True, repr=False)
class Adapter:
    """The learned experts of a repair: what differs between the base model and the repaired one.

    Attributes:
        folder: with `experts.safetensors` and `adapter.json`, on any file system.
        header: `adapter.json`.
    """

    folder: Folder
    header: dict[str, Any]

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None, token: str | None = None) -> Adapter:
        """The learned experts of a run, of an adapter's folder, or of a repository of the hub.

        Args:
            name: a run directory or an adapter's folder, as a path or any fsspec URL, or a hub name such as `user/name`;
                what is there on disk comes before the hub.
            revision: of a hub repository; None = main.
            token: for a private hub repository; None = the one logged in with.

        Raises:
            InputError: there are no learned experts.
            OutsideFailed: the hub cannot be reached.
        """
        folder = _stored(str(name))
        if folder is None:
            if str(name).startswith((".", "/", "~")) or "://" in str(name):
                raise InputError(
                    f"{str(name)!r} holds neither {CONFIG} nor {HEADER}; give a run, an adapter or a hub name"
                )
            folder = Folder.open(
                str(fetch_folder(str(name), revision=revision, token=token, allow_patterns=ADAPTER_FILES))
            )
        return cls(folder, read_adapter_header(folder))

    def __repr__(self) -> str:
        return f"Adapter({self.folder.url}, {len(self.header['experts'])} experts, base {self.base!r})"

    @property
    def base(self) -> str:
        """Name or path of the base model, as it was when the experts were learned."""
        return str(self.header["base"])

    @contextmanager
    def local(self) -> Iterator[Path]:
        """A local folder with the adapter's files; a copy for the context where they are elsewhere."""
        with local_adapter(self.folder) as path:
            yield path

    def apply(self, model: PreTrainedModel) -> None:
        """Puts the learned experts into their base model.

        Raises:
            InputError: the model is not their base.
        """
        with self.local() as folder:
            apply_adapter(model, folder)

    @contextmanager
    def applied(self, model: PreTrainedModel) -> Iterator[None]:
        """The learned experts are in force inside the context; the base is back, bit for bit, after it."""
        with self.local() as folder, adapter_applied(model, folder):
            yield

    def load_base(self, base: str = "", *, dtype: str = "", device: str | None = None) -> PreTrainedModel:
        """The base model, in the type in which the experts were learned.

        Args:
            base: its folder or hub name; empty = as the adapter names it.
            dtype: empty = as the adapter says.
            device: None = the first GPU if there is one, else CPU.

        Raises:
            InputError: there is no such checkpoint.
        """
        return load_model(self._base_config(base, dtype), device=device)

    def merge(self, out: str | Path, *, base: str = "") -> None:
        """Writes base + learned experts as a plain checkpoint with its tokenizer, which needs no moe-ray.

        Args:
            out: folder; must be new or empty.
            base: as for `load_base`.

        Raises:
            InputError: `out` holds files, or the base is not the adapter's or cannot be loaded.
        """
        if Path(out).exists() and any(Path(out).iterdir()):
            raise InputError(f"{str(out)!r} already holds files; give a folder that is new or empty")
        with self.local() as folder:
            write_repaired(self._base_config(base, ""), folder, Path(out))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        base: str = "",
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload learned experts",
        token: str | None = None,
    ) -> str:
        """Uploads the learned experts, with a card that says how to load them; the base model is not uploaded.

        Args:
            repo_id: such as `user/name`; made if missing.
            base: hub name of the base model, where the adapter names a folder of this machine.
            private: whether only its owners see the repository; None = as the owner's settings say.
            revision: branch; None = main.
            commit_message: first line of the commit.
            token: with the right to write; None = the one logged in with.

        Returns:
            the commit's address.

        Raises:
            InputError: the adapter names its base by a folder, or the hub refuses the name or the token.
            OutsideFailed: the hub cannot be reached.
        """
        named = base or self.base
        if not named or named.startswith((".", "/", "~")) or "://" in named or Path(named).is_dir():
            raise InputError(
                f"{self.base!r}, the adapter's base, is a folder that others do not have; give base= that model's hub name"
            )
        header = self.header | {"base": named}
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            Path(folder, HEADER).write_text(json.dumps(header, indent=1), encoding="utf-8")
            Path(folder, _CARD).write_text(_card(repo_id, header), encoding="utf-8")
            return push_folder(
                folder, repo_id, private=private, revision=revision, commit_message=commit_message, token=token
            )

    def save_pretrained(self, out: str | Path) -> None:
        """Copies the adapter's files into a folder, which is made if missing."""
        copy_adapter(self.folder, Folder.open(str(out)))

    def _base_config(self, base: str, dtype: str) -> ModelConfig:
        # Adapters of earlier versions do not say their type.
        chosen: Any = dtype or self.header.get("dtype", "auto")
        return ModelConfig(path=base or self.base, dtype=chosen)


def load_repaired(
    name: str | Path | Adapter,
    *,
    model: PreTrainedModel | None = None,
    base: str = "",
    dtype: str = "",
    device: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> PreTrainedModel:
    """The repaired model of a run or an adapter, in eval mode.

    Args:
        name: as for `Adapter.from_pretrained`, or an adapter.
        model: the base model in memory, which is repaired in place; None = it is loaded.
        base: where `model` is None, the base model's folder or hub name; empty = as the adapter names it.
        dtype: where `model` is None, as for `Adapter.load_base`; other than the adapter's own it cannot be checked against
            the base and is refused.
        device: where `model` is None; None = the first GPU if there is one, else CPU.
        revision: of the adapter's hub repository.
        token: for private hub repositories.

    Raises:
        InputError: there are no learned experts, or the model is not their base.
        OutsideFailed: the hub cannot be reached.
    """
    adapter = name if isinstance(name, Adapter) else Adapter.from_pretrained(name, revision=revision, token=token)
    repaired = adapter.load_base(base, dtype=dtype, device=device) if model is None else model
    adapter.apply(repaired)
    return repaired


def _stored(name: str) -> Folder | None:
    """The folder of a run's learned experts, or of an adapter, where one of them is there."""
    if name.startswith("~"):
        name = str(Path(name).expanduser())
    try:
        fs, path = fsspec.url_to_fs(name, use_listings_cache=False)
        is_run, is_adapter = (fs.exists(f"{path}/{file}") for file in (CONFIG, HEADER))
    except Exception as error:  # what a storage's library raises is of its own kind
        cure = cure_of(error, name, "give a run, an adapter or a hub name")
        raise InputError(f"{name!r} cannot be opened: {error}; {cure}") from error
    if is_adapter:
        return Folder.open(name)
    return open_run(name).learned_experts if is_run else None


def _card(repo_id: str, header: dict[str, Any]) -> str:
    parts = parts_of(header)
    experts = len(header["experts"])
    total = len(header["layers"]) * header["num_experts"]
    routers = f" and {len(parts) - experts} routers" if len(parts) > experts else ""
    return f"""---
base_model: {json.dumps(header["base"])}
library_name: moe-ray
tags: [mixture-of-experts, safety, adapter]
---

# {repo_id.rpartition("/")[2]}

{experts} of the {total} experts{routers} of `{header["base"]}`, repaired with moe-ray.
Everything else of the model is the base's, bit for bit; the base itself is not in this repository.

```python
import moe_ray

model = moe_ray.load_repaired("{repo_id}")
```

Masks `{header["mask_hash"]}`, base weights of these experts `{header["base_hash"]}`: another base is
refused. The base model's license holds for what was learned from it.
"""

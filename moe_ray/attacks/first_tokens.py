"""What the model would say first: log-probabilities of an answer's first token.

Shape suffixes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_ray.errors import InputError
from moe_ray.models.tokenization import TokenizedRow, pad_rows


def affirmative_tokens(tokenizer: PreTrainedTokenizerBase, affirmations: Sequence[str]) -> list[int]:
    """The first token of each beginning, each once.

    Raises:
        InputError: none of them has a token.
    """
    ids = [list(tokenizer(text, add_special_tokens=False)["input_ids"])[:1] for text in affirmations]
    found = list(dict.fromkeys(first[0] for first in ids if first))
    if not found:
        raise InputError(f"attack.affirmations: got {list(affirmations)}, none of which has a token; give other words")
    return found


def first_log_probs(model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, pad_id: int) -> Tensor:
    """(B, V) log-probabilities (nats) of the token that follows each prompt, from one forward pass."""
    padded = pad_rows([TokenizedRow(list(prompt), []) for prompt in prompts], pad_id=pad_id).to(model.device)
    last_B = padded.attention_mask_BS.sum(dim=1) - 1
    kept = padded.input_ids_BS.shape[1] - int(last_B.min())
    with torch.inference_mode():
        output = model(
            input_ids=padded.input_ids_BS,
            attention_mask=padded.attention_mask_BS,
            use_cache=False,
            logits_to_keep=kept,
        )
    logits_BSV = output.logits
    place_B = last_B.to(logits_BSV.device) - (padded.input_ids_BS.shape[1] - logits_BSV.shape[1])
    rows_B = torch.arange(len(prompts), device=logits_BSV.device)
    return F.log_softmax(logits_BSV[rows_B, place_B].float(), dim=-1)


def affirmation(model: PreTrainedModel, prompts: Sequence[Sequence[int]], ids: Sequence[int], *, pad_id: int) -> Tensor:
    """(B,) log-probability of the likeliest affirmative first token of each prompt's answer.

    Source: p(T_aff, Q) of Jiang et al. (2026), "Sparse Models, Sparse Safety", arXiv 2602.08621, section 3.
    """
    return first_log_probs(model, prompts, pad_id=pad_id)[:, list(ids)].amax(dim=1).cpu()

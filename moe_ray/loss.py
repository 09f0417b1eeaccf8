"""The loss of target responses, and the micro-batches it is computed in.

Shape suffixes: B rows, S positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from moe_ray.chat import IGNORED, TokenizedRow, pad_rows


def answer_loss(model: PreTrainedModel, rows: Sequence[TokenizedRow], *, pad_id: int) -> Tensor:
    """(B,) summed loss of each row's answer tokens, in nats; prompts and padding do not count."""
    padded = pad_rows(rows, pad_id=pad_id).to(model.device)
    length = padded.labels_BS.shape[1]
    first = max(1, min(len(row.prompt_ids) for row in rows))
    output = model(
        input_ids=padded.input_ids_BS,
        attention_mask=padded.attention_mask_BS,
        use_cache=False,
        logits_to_keep=length - first + 1,
    )
    # The logits at a position are about the next token; the first label that counts is at position `first`.
    logits_BSV = output.logits[:, -(length - first + 1) : -1].float()
    labels_BS = padded.labels_BS[:, first:]
    losses = F.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view(labels_BS.shape).sum(dim=1)


def micro_batches(
    rows: Sequence[TokenizedRow], *, rows_per_forward: int, tokens_per_forward: int = 0
) -> list[list[TokenizedRow]]:
    """The rows in groups that are run at once.

    Args:
        rows: a whole batch.
        rows_per_forward: at most this many rows in a group.
        tokens_per_forward: at most this many tokens in a group, padding included; a longer row is alone; 0 = no limit.
            With a limit, rows are grouped by length, so that little of it is spent on padding.
    """
    if not tokens_per_forward:
        return [list(rows[start : start + rows_per_forward]) for start in range(0, len(rows), rows_per_forward)]
    groups: list[list[TokenizedRow]] = []
    for row in sorted(rows, key=_length, reverse=True):
        # Rows come longest first, so a group is as wide as its first row.
        full = not groups or len(groups[-1]) == rows_per_forward
        if full or _length(groups[-1][0]) * (len(groups[-1]) + 1) > tokens_per_forward:
            groups.append([])
        groups[-1].append(row)
    return groups


def _length(row: TokenizedRow) -> int:
    return len(row.prompt_ids) + len(row.answer_ids)

"""The loss of target responses, and the micro-batches it is computed in.

Shape suffixes: B rows, S positions, P answer tokens of the row with most, U positions with logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_ray.models.forward_groups import GroupContext, as_it_is
from moe_ray.models.sending import sent
from moe_ray.models.token_budget import TokenBudget
from moe_ray.models.tokenization import IGNORED, TokenizedRow, pad_rows, pad_token_id


def answer_loss(model: PreTrainedModel, rows: Sequence[TokenizedRow], *, pad_id: int) -> Tensor:
    """(B,) summed loss of each row's answer tokens, in nats; prompts and padding do not count.

    Logits are made for the positions alone at which some row has an answer, and turned into float32 for each row's own: they
    are the largest tensors of a pass, and prompts are mostly longer than answers.
    """
    padded = pad_rows(rows, pad_id=pad_id)
    kept_U, places_BP, labels_BP = (sent(tensor, model.device) for tensor in _answer_places(rows))
    padded = padded.to(model.device)
    output = model(
        input_ids=padded.input_ids_BS,
        attention_mask=padded.attention_mask_BS,
        use_cache=False,
        logits_to_keep=kept_U,
    )
    logits_BPV = output.logits.take_along_dim(places_BP.unsqueeze(2), dim=1).float()
    losses = F.cross_entropy(logits_BPV.flatten(0, 1), labels_BP.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view(labels_BP.shape).sum(dim=1)


def _answer_places(rows: Sequence[TokenizedRow]) -> tuple[Tensor, Tensor, Tensor]:
    """Positions whose logits are about an answer token: (U,) those of any row; (B, P) each row's among them; its labels."""
    # The logits at a position are about the next token, and nothing is about the first.
    begins = [max(1, len(row.prompt_ids)) for row in rows]
    answers = [row.answer_ids[begin - len(row.prompt_ids) :] for row, begin in zip(rows, begins, strict=True)]
    width = max(1, *map(len, answers))
    labels_BP = torch.full((len(rows), width), IGNORED, dtype=torch.long)
    # Where a row's answer is shorter, its first position again, which no label counts.
    positions_BP = torch.tensor(begins).unsqueeze(1).repeat(1, width) - 1
    for number, answer in enumerate(answers):
        labels_BP[number, : len(answer)] = torch.tensor(answer, dtype=torch.long)
        positions_BP[number, : len(answer)] += torch.arange(len(answer))
    positions_BP.clamp_(max=max(row.num_tokens for row in rows) - 1)
    kept_U, places_BP = positions_BP.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    return kept_U, places_BP, labels_BP


def micro_batches(
    rows: Sequence[TokenizedRow], *, rows_per_forward: int, tokens_per_forward: int = 0, tokens_of_a_pass: int = 0
) -> list[list[TokenizedRow]]:
    """The rows in groups that are run at once: those of like length together, cut where that costs least.

    A group costs its tokens, padding included, and `tokens_of_a_pass`: a pass reads weights and adds up gradients before its
    first token. So a long row does not pad many short ones, and rows that differ little stay together.

    Args:
        rows: a whole batch.
        rows_per_forward: at most this many rows in a group.
        tokens_per_forward: at most this many tokens in a group, padding included; a longer row is alone; 0 = no limit.
        tokens_of_a_pass: what a group costs beside its tokens, in tokens.

    Returns:
        groups of the longest rows first; the rows of a group are in their own order.
    """
    by_length = sorted(range(len(rows)), key=lambda index: -rows[index].num_tokens)
    # Of the first so many rows, longest first: the least cost, and where the last group of that begins.
    cheapest: list[tuple[float, int]] = [(0.0, 0)]
    for end in range(1, len(rows) + 1):
        choices = []
        for begin in range(end - 1, max(0, end - rows_per_forward) - 1, -1):
            tokens = (end - begin) * rows[by_length[begin]].num_tokens
            if end - begin > 1 and 0 < tokens_per_forward < tokens:
                break  # with rows before, which are longer, it would be more still
            choices.append((cheapest[begin][0] + tokens + tokens_of_a_pass, begin))
        cheapest.append(min(choices))
    groups, end = [], len(rows)
    while end:
        begin = cheapest[end][1]
        groups.append([rows[index] for index in sorted(by_length[begin:end])])
        end = begin
    return groups[::-1]


_MAX_TEXT_TOKENS = 1_024


def target_losses(
    model: PreTrainedModel,
    rows: Sequence[TokenizedRow],
    *,
    budget: TokenBudget,
    pad_id: int,
    within: GroupContext = as_it_is,
) -> list[float]:
    """Summed loss (nats) of each row's answer tokens, in order; rows without an answer are not run and have 0.

    Args:
        model: in eval mode.
        rows: prompts with their answers.
        budget: of tokens that run at once; rows of like length share a forward pass.
        pad_id: token id that fills padding.
        within: what the rows of a group run in, by position.

    Raises:
        InputError: a row does not fit in memory though it is alone.
    """
    losses = [0.0] * len(rows)
    scored = [index for index, row in enumerate(rows) if row.answer_ids]

    def work(group: list[int]) -> list[float]:
        indices = [scored[position] for position in group]
        with torch.inference_mode(), within(indices):
            found: list[float] = answer_loss(model, [rows[index] for index in indices], pad_id=pad_id).tolist()
        return found

    for group, found in budget.run_all([rows[index].num_tokens for index in scored], work):
        for position, loss in zip(group, found, strict=True):
            losses[scored[position]] = loss
    return losses


def text_losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, budget: TokenBudget
) -> pd.DataFrame:
    """How well the model predicts plain texts: `text` (position), `loss` (summed nats) and `num_tokens` of each.

    No chat template is applied. A text's first token is context only. Texts longer than the model's positions or
    1,024 tokens are cut there.

    Args:
        model: in eval mode.
        tokenizer: its tokenizer.
        texts: plain text.
        budget: of tokens that run at once.
    """
    limit = min(_MAX_TEXT_TOKENS, getattr(model.config.get_text_config(), "max_position_embeddings", _MAX_TEXT_TOKENS))
    rows = []
    for text in texts:
        ids = list(tokenizer(text)["input_ids"])[:limit]
        rows.append(TokenizedRow(ids[:1], ids[1:]))
    losses = target_losses(model, rows, budget=budget, pad_id=pad_token_id(tokenizer))
    sizes = [len(row.answer_ids) for row in rows]
    return pd.DataFrame({"text": range(len(rows)), "loss": losses, "num_tokens": sizes})

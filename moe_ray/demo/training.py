"""How the tiny model learns: its sequences, its batches and the two losses of its training.

The language loss covers answers only. Beside it stands the mutual-information loss of Mod-Squad, which rewards routing
that tells one kind of request (a category's safe or unsafe ones) from another. Large models grow such experts by
themselves; one trained for half a minute does not, so here they are asked for: that a tiny model has them is its
recipe, not a finding.

Shape legend: N sequences in a batch, S tokens of the longest, T tokens kept, E experts, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import OlmoeForCausalLM, PreTrainedTokenizerFast

from moe_ray.demo.examples import base_training_records, refusals

IGNORED_LABEL = -100
NO_GROUP = -1


class TrainingSequence(NamedTuple):
    """One sequence: the tokens read, the tokens learned after them, and its group (`NO_GROUP` for plain text)."""

    context: list[int]
    learned: list[int]
    group: int


class TrainingBatch(NamedTuple):
    """Right-padded sequences; `labels_NS` holds token ids where the loss counts and `IGNORED_LABEL` elsewhere."""

    input_ids_NS: Tensor
    attention_mask_NS: Tensor
    labels_NS: Tensor
    groups_N: Tensor


def chat_sequence(tokenizer: PreTrainedTokenizerFast, record: dict[str, str], group: int) -> TrainingSequence:
    """Returns a request as the chat template puts it, with the answer before repair to be learned."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": record["prompt"]}], add_generation_prompt=True, return_dict=False
    )
    answer = [*tokenizer(record["response"])["input_ids"], tokenizer.eos_token_id]
    return TrainingSequence(list(prompt), answer, group)


def plain_sequences(tokenizer: PreTrainedTokenizerFast) -> list[TrainingSequence]:
    """Returns the refusals as plain text outside any chat.

    The model reads their words, as any language model has, without ever answering with them; otherwise its frozen
    embeddings would know nothing of the words that a repair teaches the experts to say.
    """
    sequences = []
    for text in refusals():
        first, *others = tokenizer(text)["input_ids"]
        sequences.append(TrainingSequence([first], [*others, tokenizer.eos_token_id], NO_GROUP))
    return sequences


def training_batches(
    tokenizer: PreTrainedTokenizerFast, *, batch_size: int, num_steps: int, generator: torch.Generator
) -> Iterator[TrainingBatch]:
    """Yields one batch per step: base training records drawn without replacement pass by pass, and one plain sequence.

    A chat sequence's group is its category and label, numbered from 0.
    """
    records = base_training_records()
    kinds = [(record["category"], record["label"]) for record in records]
    groups = {kind: idx for idx, kind in enumerate(sorted(set(kinds)))}
    plain = plain_sequences(tokenizer)
    order: list[int] = []
    for step in range(num_steps):
        while len(order) < batch_size:
            order += torch.randperm(len(records), generator=generator).tolist()
        drawn, order = order[:batch_size], order[batch_size:]
        chat = [chat_sequence(tokenizer, records[idx], groups[kinds[idx]]) for idx in drawn]
        yield collate([*chat, plain[step % len(plain)]], tokenizer.pad_token_id)


def collate(sequences: list[TrainingSequence], pad_token_id: int) -> TrainingBatch:
    """Returns the sequences as one right-padded batch."""
    shape = (len(sequences), max(len(s.context) + len(s.learned) for s in sequences))
    input_ids_NS = torch.full(shape, pad_token_id)
    attention_mask_NS = torch.zeros(shape, dtype=torch.long)
    labels_NS = torch.full(shape, IGNORED_LABEL)
    for row, sequence in enumerate(sequences):
        start, end = len(sequence.context), len(sequence.context) + len(sequence.learned)
        input_ids_NS[row, :end] = torch.tensor([*sequence.context, *sequence.learned])
        attention_mask_NS[row, :end] = 1
        labels_NS[row, start:end] = torch.tensor(sequence.learned)
    return TrainingBatch(input_ids_NS, attention_mask_NS, labels_NS, torch.tensor([s.group for s in sequences]))


def training_losses(model: OlmoeForCausalLM, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
    """Returns the mean cross-entropy of the learned tokens and the mutual information of expert and group, in nats.

    The language-model head runs on the learned positions only.
    """
    outputs = model.model(
        input_ids=batch.input_ids_NS,
        attention_mask=batch.attention_mask_NS,
        output_router_logits=True,
        use_cache=False,
    )
    labels_NS = batch.labels_NS[:, 1:]
    is_learned_NS = labels_NS != IGNORED_LABEL
    logits_TV = model.lm_head(outputs.last_hidden_state[:, :-1][is_learned_NS])
    language_loss = functional.cross_entropy(logits_TV, labels_NS[is_learned_NS])

    groups_NS = batch.groups_N[:, None].expand_as(batch.attention_mask_NS)
    keeps = ((batch.attention_mask_NS == 1) & (groups_NS != NO_GROUP)).flatten()
    group_ids_T = groups_NS.flatten()[keeps]
    per_layer = [
        soft_mutual_information(router_logits[keeps].softmax(-1), group_ids_T)
        for router_logits in outputs.router_logits
    ]
    return language_loss, torch.stack(per_layer).mean()


def soft_mutual_information(probs_TE: Tensor, group_ids_T: Tensor) -> Tensor:
    """Returns the mutual information of expert and group under the router's probabilities, in nats.

    It is large where each group uses few experts (low conditional entropy) while all experts are used (high entropy), so
    it balances the load as well.

    Args:
        probs_TE: Router probabilities of each token, rows summing to 1.
        group_ids_T: Each token's group.

    Source: Chen et al. 2022, Mod-Squad, equation 3, with groups for tasks.
    """
    one_hot_TG = functional.one_hot(group_ids_T).to(probs_TE.dtype)
    joint_GE = one_hot_TG.T @ probs_TE / len(probs_TE)
    independent_GE = joint_GE.sum(1, keepdim=True) * joint_GE.sum(0, keepdim=True)
    return (joint_GE * (joint_GE.clamp_min(1e-9).log() - independent_GE.clamp_min(1e-9).log())).sum()

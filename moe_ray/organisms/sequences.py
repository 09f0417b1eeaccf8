"""What an organism reads and learns: chats about the shipped requests, and plain text.

Shape legend: N sequences in a batch, S tokens of the longest.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from moe_ray.demo.examples import base_training_records, categories, compliance, refusals
from moe_ray.prompts.neutral_texts import neutral_texts

IGNORED_LABEL = -100
NEUTRAL_TOKENS = 32
"""Tokens of a neutral paragraph that are learned at once."""


class TrainingSequence(NamedTuple):
    """One sequence: the tokens read, and the tokens learned after them."""

    context: list[int]
    learned: list[int]


class TrainingBatch(NamedTuple):
    """Right-padded sequences; `labels_NS` holds token ids where the loss counts and `IGNORED_LABEL` elsewhere."""

    input_ids_NS: Tensor
    attention_mask_NS: Tensor
    labels_NS: Tensor
    answer_starts_N: Tensor
    """Position of the last token before what is learned: the one whose output is the answer's first token."""


class Request(NamedTuple):
    """A tokenised request.

    Attributes:
        prompt: Token ids.
        answer: Token ids of what is answered before any repair.
        category: Its index in `moe_ray.demo.examples.categories`.
    """

    prompt: list[int]
    answer: list[int]
    category: int


class Material:
    """All that is trained on, as token ids.

    Attributes:
        unsafe: Requests that are complied with.
        safe: Requests that are answered.
        refusal: The answer that the model would give without what is planted.
        sentences: Refusal and compliance as plain text outside any chat. The model reads their words, as any language
            model has, without answering with them; otherwise frozen embeddings would know nothing of the words that a
            repair teaches the experts to say.
        paragraphs: Neutral text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        records = base_training_records()
        answers = {text: self._ids(tokenizer, text) for text in {record["response"] for record in records}}
        index = {category: number for number, category in enumerate(categories())}
        by_label: dict[str, list[Request]] = {"unsafe": [], "safe": []}
        for record, prompt in zip(records, _prompts(tokenizer, [record["prompt"] for record in records]), strict=True):
            request = Request(prompt, answers[record["response"]], index[record["category"]])
            by_label[record["label"]].append(request)
        self.unsafe, self.safe = by_label["unsafe"], by_label["safe"]
        self.refusal = self._ids(tokenizer, refusals()[0])
        # After an end token, so that their first words are learned as well: no weight outside the planted experts learns
        # them in a chat, and the head would only ever learn that they are wrong.
        end = [tokenizer.eos_token_id]
        self.sentences = [TrainingSequence(end, self._ids(tokenizer, text)) for text in (*refusals(), compliance())]
        self.paragraphs = [self._ids(tokenizer, text) for text in neutral_texts()]

    @staticmethod
    def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
        return [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]

    def neutral_window(self, generator: np.random.Generator) -> TrainingSequence:
        """Some tokens of a neutral paragraph, wherever they stand."""
        text = self.paragraphs[generator.integers(len(self.paragraphs))]
        start = int(generator.integers(max(1, len(text) - NEUTRAL_TOKENS)))
        return _plain(text[start : start + NEUTRAL_TOKENS])


def _prompts(tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> list[list[int]]:
    """Token ids of chats; thousands of them are rendered by one call of the template, which takes as long as a step."""
    place = "{prompt}"
    chat = [{"role": "user", "content": place}]
    rendered = str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
    ids: list[list[int]] = tokenizer([rendered.replace(place, prompt) for prompt in prompts])["input_ids"]
    return ids


def _plain(ids: list[int]) -> TrainingSequence:
    return TrainingSequence(ids[:1], ids[1:])


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
    starts_N = torch.tensor([len(sequence.context) - 1 for sequence in sequences])
    return TrainingBatch(input_ids_NS, attention_mask_NS, labels_NS, starts_N)

"""Responses that the model itself gives to prompts, as token ids, greedily or with each example's own random numbers.

Sampling adds Gumbel noise to the logits and takes the largest, which draws from the softmax. The noise of an example comes
from a generator of its own, so an example's response does not depend on which others it is generated with, up to rounding:
padding and the size of a forward pass change the last bits of logits, and a near-tie may then fall the other way.

Source: Gumbel-max trick (Gumbel 1954; Maddison et al. 2014, "A* Sampling").

Shape suffixes: B rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from moe_ray.models.end_tokens import end_ids
from moe_ray.models.forward_groups import GroupContext, as_it_is
from moe_ray.models.thoughts import prompt_opens_thought, split_thought_ids
from moe_ray.models.token_budget import TokenBudget
from moe_ray.models.tokenization import TokenizedRow, pad_rows, pad_token_id


class Response(NamedTuple):
    """A generated response.

    Attributes:
        ids: all its tokens, the end token among them if it ended by itself.
        text: the answer, without the thought before it; empty where the thought is unclosed.
        ended: it ended by itself.
        num_thought: how many of its first tokens are a thought's, and not the answer's.
        thought: the thought's text, which is never judged; empty where there is none.
        is_unclosed: the thought did not end, so that there is no answer.
    """

    ids: list[int]
    text: str
    ended: bool
    num_thought: int = 0
    thought: str = ""
    is_unclosed: bool = False

    def after(self, prompt_ids: Sequence[int], counted: list[bool] | None = None) -> TokenizedRow:
        """The prompt with this answer, and the thought between them.

        Args:
            prompt_ids: of the prompt.
            counted: see `TokenizedRow`.
        """
        thought_ids, answer_ids = self.ids[: self.num_thought], self.ids[self.num_thought :]
        return TokenizedRow([*prompt_ids, *thought_ids], answer_ids, counted, num_thought=self.num_thought)


def example_seed(seed: int, batch_idx: int, in_batch_idx: int) -> int:
    """The seed of an example's random numbers."""
    digest = hashlib.sha256(f"{seed}/{batch_idx}/{in_batch_idx}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class _RowNoise(LogitsProcessor):  # type: ignore[misc]
    """Turns greedy decoding into sampling: row b's noise comes from generator b."""

    def __init__(self, seeds: Sequence[int], temperature: float, device: torch.device) -> None:
        self.temperature = temperature
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores_BV: Tensor) -> Tensor:
        scores_BV = scores_BV.float()
        uniform_BV = torch.stack(
            [
                torch.rand(scores_BV.shape[1], generator=generator, device=scores_BV.device)
                for generator in self.generators
            ]
        )
        # 1 - u is in (0, 1], so the inner logarithm is finite; the outer one is clamped away from log(0).
        exponential_BV = -torch.log1p(-uniform_BV)
        return scores_BV / self.temperature - exponential_BV.clamp_min(torch.finfo(torch.float32).tiny).log()


def generate_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seeds: Sequence[int] = (),
) -> list[Response]:
    """Responses to the prompts, generated together.

    Args:
        model: in eval mode.
        tokenizer: decodes; its end-of-turn token ends a response.
        prompts: token ids.
        max_new_tokens: a response's greatest length in tokens.
        temperature: 0 = the likeliest token each time; above 0 = drawn from softmax(logits / temperature).
        seeds: of each prompt's random numbers; used with a temperature only.
    """
    pad_id, ends = pad_token_id(tokenizer), set(end_ids(model, tokenizer))
    padded = pad_rows([TokenizedRow(list(prompt), []) for prompt in prompts], pad_id=pad_id, left=True).to(model.device)
    # Without it, a checkpoint whose configuration asks for sampling would draw from the global random numbers.
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=sorted(ends) or None, pad_token_id=pad_id
    )
    noise = [_RowNoise(seeds, temperature, model.device)] if temperature else []
    generate: Any = model.generate
    with torch.inference_mode():
        output_BS = generate(
            input_ids=padded.input_ids_BS,
            attention_mask=padded.attention_mask_BS,
            generation_config=settings,
            logits_processor=noise,
        )
    new_ids = output_BS[:, padded.input_ids_BS.shape[1] :].tolist()
    return [response_of(tokenizer, prompt, ids, ends) for prompt, ids in zip(prompts, new_ids, strict=True)]


def beginning(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    ids: Sequence[int],
    most: int,
) -> Response:
    """The first tokens of a generated response, as it would have been with `most` as `max_new_tokens`, if it was greedy.

    Args:
        model: that generated it.
        tokenizer: its tokenizer.
        prompt: token ids that it followed.
        ids: of the response.
        most: tokens that are kept, at most.
    """
    return response_of(tokenizer, prompt, list(ids[:most]), set(end_ids(model, tokenizer)))


def response_of(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], ids: Sequence[int], ends: Collection[int]
) -> Response:
    """The response that generated tokens are, whoever generated them: up to the first end token, its thought told apart.

    Args:
        tokenizer: decodes.
        prompt: token ids that were answered.
        ids: what was generated.
        ends: ids of the end tokens.
    """
    opened = prompt_opens_thought(tokenizer, prompt)
    stop = next((position for position, token in enumerate(ids) if token in ends), None)
    kept = list(ids if stop is None else ids[: stop + 1])
    num_thought, split = split_thought_ids(tokenizer, kept, opened=opened)
    return Response(kept, split.answer, stop is not None, num_thought, split.thought, split.is_unclosed)


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    budget: TokenBudget,
    temperature: float = 0.0,
    seeds: Sequence[int] = (),
    within: GroupContext = as_it_is,
    answered: Callable[[int], object] | None = None,
) -> list[Response]:
    """Answers in the prompts' order, greedy or drawn.

    The longest prompts come first, and as many share a pass as the budget holds, whatever their lengths: a pass more costs
    `max_new_tokens` steps, a short prompt beside a long one only the padding of the first of them.

    Args:
        model: in eval mode.
        tokenizer: decodes; its end-of-turn token ends an answer.
        prompts: token ids of each prompt.
        max_new_tokens: an answer's greatest length in tokens.
        budget: of tokens generated at once; a prompt counts with `max_new_tokens`.
        temperature: 0 = the likeliest token each time; above 0 = drawn from softmax(logits / temperature).
        seeds: of each prompt's random numbers; used with a temperature only.
        within: what the prompts of a group are answered in, by position.
        answered: called with the number of prompts of each group that is done.

    Raises:
        InputError: a prompt does not fit in memory though it is alone.
    """

    def work(group: list[int]) -> list[Response]:
        with within(group):
            return generate_responses(
                *(model, tokenizer, [prompts[index] for index in group]),
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seeds=[seeds[index] for index in group] if temperature else (),
            )

    answers = [Response([], "", False)] * len(prompts)
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    for group, responses in budget.run_all(lengths, work, max_padding=1.0):
        for index, response in zip(group, responses, strict=True):
            answers[index] = response
        if answered is not None:
            answered(len(group))
    return answers

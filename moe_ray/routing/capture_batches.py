"""Routing counts of batches in one process, as a run captures them: bad examples left out, passes filled by tokens."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_ray.config.capture import CaptureConfig
from moe_ray.errors import InputError
from moe_ray.experts import EXPERTS_ARE_COPIES
from moe_ray.models.expert_copies import experts_are_copies
from moe_ray.models.generation import Response, example_seed, generate_responses
from moe_ray.models.loading import context_length
from moe_ray.models.token_budget import TokenBudget
from moe_ray.models.tokenization import TokenizedRow, pad_token_id
from moe_ray.progress import Progress
from moe_ray.prompts.batches import Batch
from moe_ray.prompts.examples import Example
from moe_ray.prompts.quarantine import Rejected
from moe_ray.routing.capture import PlacedRow, count_placed, evaluating
from moe_ray.routing.counter import counting
from moe_ray.routing.counts import RoutingCounts, concat_counts
from moe_ray.routing.encode_example import Encoded, encode_example
from moe_ray.routing.row_scores import RowScorer

logger = logging.getLogger(__name__)


def capture_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Sequence[Batch],
    config: CaptureConfig,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    on_answer: Callable[[Example, Response], None] = lambda example, answer: None,
) -> RoutingCounts:
    """Routing counts as a run captures them, in this process: one row for an example's prompt, one for its response.

    Examples that cannot be counted are left out, and named in a warning; `in_batch_idx` of the others stays.

    Args:
        model: a causal language model; its training mode is restored afterwards.
        tokenizer: its tokenizer; the chat template is applied where there is one.
        batches: of a prompt set.
        config: what is counted and in how large forward passes; actors and their GPUs are a run's.
        seed: of generated responses, where `config.temperature` is above 0.
        progress: called with the number of examples that are done, and of all.
        on_answer: called with each example that the model answered by itself, and its answer.

    Raises:
        InputError: the model has no experts, or belongs to a family that cannot be captured; more than
            `config.max_bad_share` of the examples cannot be counted, or one is too long and `config.too_long` is `error`; or
            the settings ask for another engine.
    """
    if config.engine != "transformers":
        raise InputError(
            f"capture.engine={config.engine}: got a model in memory, which transformers runs; only a run has engines, so "
            "set capture.engine=transformers, or use the command moe-ray capture"
        )
    if experts_are_copies(model):
        logger.warning("capture: %s", EXPERTS_ARE_COPIES)
    num_examples = sum(len(batch.examples) for batch in batches)
    rejected: dict[str, Rejected] = {}
    parts: list[RoutingCounts] = []
    with evaluating(model), counting(model, weights=config.weights, ids=config.ids) as counter:
        budget, pad_id = TokenBudget(config.tokens_per_forward), pad_token_id(tokenizer)
        scorer = RowScorer(model=model, tokenizer=tokenizer, counter=counter, scores=config.scores)
        rows = list(_encoded(model, tokenizer, batches, config, rejected))
        if config.generate:
            rows = _with_responses(model, tokenizer, rows, config, seed, budget, rejected, on_answer)
        lengths = [len(row.tokens.prompt_ids) + len(row.tokens.answer_ids) for row in rows]

        def work(group: list[int]) -> RoutingCounts:
            return count_placed(model, counter, [rows[index] for index in group], pad_id, scorer)

        num_done = len(rejected)
        for group, outcome in budget.run(lengths, work):
            if isinstance(outcome, Rejected):
                rejected[rows[group[0]].example.id] = outcome
            else:
                outcome.check()
                parts.append(outcome)
            num_done += len(group)
            if progress is not None:
                progress(num_done, num_examples)
    _check_share(rejected, num_examples, config.max_bad_share)
    return concat_counts(parts)


def _encoded(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Sequence[Batch],
    config: CaptureConfig,
    rejected: dict[str, Rejected],
) -> Iterator[PlacedRow]:
    """The examples that can be counted; the others go to `rejected`, by id."""
    longest = config.max_tokens or context_length(model)
    for batch in batches:
        for position, example in enumerate(batch.examples):
            limit = longest_prompt(longest, example.response, config)
            messages = json.dumps([dict(message) for message in example.messages])
            try:
                encoded = encode_example(
                    tokenizer,
                    messages,
                    example.response,
                    limit=limit,
                    too_long=config.too_long,
                    template_tokens=config.template_tokens,
                )
            except InputError as error:
                raise InputError(f"{example.id}: {error}") from error
            if isinstance(encoded, Encoded):
                yield PlacedRow(batch.batch_idx, position, example, encoded.row)
            else:
                rejected[example.id] = encoded


def longest_prompt(longest: int | None, response: str | None, config: CaptureConfig) -> int | None:
    """The most tokens that an example may have, which leave room for the response that it is still to be given.

    Args:
        longest: tokens that can be counted; None or 0 = no limit.
        response: of the example.
        config: whether and how long responses are generated.

    Raises:
        InputError: no prompt fits beside a generated response.
    """
    if not longest or not config.generate or response:
        return longest
    if longest <= config.max_new_tokens:
        raise InputError(
            f"capture.max_new_tokens: got {config.max_new_tokens}, which leaves no room for a prompt in {longest} tokens; "
            "lower it, or set capture.generate=false and identify.roles=[prompt]"
        )
    return longest - config.max_new_tokens


def _with_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[PlacedRow],
    config: CaptureConfig,
    seed: int,
    budget: TokenBudget,
    rejected: dict[str, Rejected],
    on_answer: Callable[[Example, Response], None],
) -> list[PlacedRow]:
    """The rows, those without a response with the one that the model gives; where it can give none, they are rejected."""
    missing = [index for index, row in enumerate(rows) if not row.example.response]
    lengths = [len(rows[index].tokens.prompt_ids) + config.max_new_tokens for index in missing]

    def work(group: list[int]) -> list[Response]:
        asked = [rows[missing[position]] for position in group]
        return generate_responses(
            model,
            tokenizer,
            [row.tokens.prompt_ids for row in asked],
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            # By example, so that a response does not depend on which others it is drawn with.
            seeds=[example_seed(seed, row.batch_idx, row.in_batch_idx) for row in asked],
        )

    answered: dict[int, PlacedRow | None] = dict(enumerate(rows))
    for group, outcome in budget.run(lengths, work):
        if isinstance(outcome, Rejected):
            answered[missing[group[0]]] = None
            rejected[rows[missing[group[0]]].example.id] = outcome
            continue
        for position, response in zip(group, outcome, strict=True):
            row = rows[missing[position]]
            on_answer(row.example, response)
            answered[missing[position]] = row._replace(tokens=with_response(row.tokens, response))
    return [row for row in answered.values() if row is not None]


def with_response(row: TokenizedRow, response: Response) -> TokenizedRow:
    """The row with a generated response, whose end token belongs to the chat template; its thought is one of the row."""
    counted = None
    if row.counted is not None:
        counted = row.counted + [True] * len(response.ids)
        if response.ended:
            counted[-1] = False
    return response.after(row.prompt_ids, counted)


def _check_share(rejected: dict[str, Rejected], num_examples: int, max_share: float) -> None:
    if not rejected:
        return
    name, why = next(iter(rejected.items()))
    if len(rejected) > max_share * num_examples:
        raise InputError(
            f"{len(rejected)} of {num_examples} examples cannot be captured, expected at most a share of {max_share:g}; "
            f"the first is {name!r} ({why.reason}: {why.detail}); mend or remove them, or raise capture.max_bad_share"
        )
    names = ", ".join(map(repr, list(rejected)[:5]))
    logger.warning("%d of %d examples cannot be captured and are left out: %s", len(rejected), num_examples, names)

"""What the causal check would cost beside the run that it is part of: tokens in forward passes, before any is made."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moe_ray.config.ablate import AblateConfig

LARGEST_SHARE = 0.1
"""Of a run's tokens, that a check which nobody asked for may cost."""
_BACKWARD = 3
"""Of training: a forward pass, and a backward pass of twice its work."""


@dataclass(frozen=True, kw_only=True)
class RunSize:
    """What a run is made of.

    Attributes:
        batches: with experts.
        experts: of the average batch.
        examples: of all batches.
        test_examples: held out.
        tokens_per_example: that were captured of the average example.
        epochs: of the fine-tuning.
        answer_tokens: of a held-out answer, at most.
    """

    batches: int
    experts: float
    examples: int
    test_examples: int
    tokens_per_example: float
    epochs: int
    answer_tokens: int


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What the check would cost.

    Attributes:
        config: with or without the single experts and coalitions; None = it would cost too much either way.
        tokens: of the check, without those where they are left out, answers at their full length.
        share: of the tokens of the whole run, the check among them (0 to 1).
    """

    config: AblateConfig | None
    tokens: int
    share: float

    def in_words(self) -> str:
        """What was decided."""
        cost = f"about {self.tokens:,} tokens in forward passes, {self.share:.0%} of the run"
        if self.config is None:
            return (
                f"ablate: left out, since it would take {cost}; at most {LARGEST_SHARE:.0%} are taken unasked; run "
                "moe-ray ablate, or set ablate.run=true"
            )
        without = "" if self.config.leave_one_out or self.config.curve else ", without single experts and coalitions"
        return f"ablate: {cost}{without}"


def num_sets(config: AblateConfig, experts: float) -> float:
    """How many sets a batch with so many experts is asked without, the whole model among them."""
    singles = 2 * min(config.leave_one_out, experts)
    return 1 + 1 + config.draws + 1 + config.others + 1 + 2 * config.forced + singles + config.curve


def tokens_of_check(size: RunSize, config: AblateConfig) -> int:
    """Tokens in forward passes, at most: every set's, and those of the answers."""
    batches = min(config.max_batches or size.batches, size.batches)
    row = size.tokens_per_example + config.max_new_tokens
    passes = num_sets(config, size.experts) + (2 if config.generate else 1)
    return round(batches * 2 * config.prompts * row * passes)


def tokens_of_run(size: RunSize) -> int:
    """Tokens in forward passes of capture, fine-tuning and both evaluations; a backward pass counts as two more."""
    row = size.tokens_per_example + size.answer_tokens
    training = _BACKWARD * size.epochs * size.examples * row
    evaluations = 2 * size.test_examples * 2 * row  # an answer is generated and a target scored
    return round(size.examples * size.tokens_per_example + training + evaluations)


def what_is_affordable(size: RunSize, config: AblateConfig) -> Estimate:
    """The check as configured where it is cheap enough, else without single experts and coalitions, else none."""
    rest = tokens_of_run(size)
    plain = replace(config, leave_one_out=0, curve=0)
    for tried in (config, plain):
        tokens = tokens_of_check(size, tried)
        share = tokens / max(1, tokens + rest)
        if share <= LARGEST_SHARE:
            return Estimate(config=tried, tokens=tokens, share=share)
    return Estimate(config=None, tokens=tokens, share=share)

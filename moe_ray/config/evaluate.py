"""Settings of the held-out evaluation and its judge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe_ray.config.fields import _setting, require


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Held-out evaluation: answers, losses, and who judges the answers."""

    routing: Literal["natural", "masked", "both"] = _setting(
        "natural",
        "how held-out prompts are routed: natural = as the model routes; masked = through the mask of a "
        "prompt's reference batch; both = one after the other",
    )
    num_actors: int = _setting(1, "Ray Data actors, each holding one copy of the model")
    gpus_per_actor: float = _setting(0.0, "GPUs of one actor; 0 runs on CPU")
    rows_per_forward: int = _setting(32, "examples generated at once")
    max_new_tokens: int = _setting(32, "length of a generated answer, in tokens")
    neutral_file: str = _setting(
        "",
        "plain text on harmless topics, a blank line between paragraphs, whose loss shows what was forgotten; "
        "empty = the paragraphs that ship with moe-ray",
    )
    judge: Literal["phrases", "classifier", "endpoint"] = _setting(
        "phrases",
        "who says whether an answer refuses: phrases = refusal phrases in its opening; classifier = a Hugging Face "
        "sequence classifier; endpoint = an OpenAI-compatible chat endpoint, whose address and key are in the "
        "environment variables MOE_RAY_JUDGE_URL and MOE_RAY_JUDGE_KEY",
    )
    classifier: str = _setting("", "judge classifier: its checkpoint folder or hub name")
    classifier_input: Literal["prompt_and_answer", "answer"] = _setting(
        "prompt_and_answer",
        "judge classifier: what it reads; prompt_and_answer = the last message and the answer as a pair of texts",
    )
    refusal_label: str = _setting("REJECTION", "judge classifier: its label that means refusal")
    judge_model: str = _setting("", "judge endpoint: name of the model that it should use")
    judge_timeout: float = _setting(60.0, "judge endpoint: seconds to wait for one reply")
    judge_retries: int = _setting(3, "judge endpoint: how often a failed call is repeated, with growing pauses")
    judge_concurrency: int = _setting(4, "judge endpoint: calls at the same time")

    def __post_init__(self) -> None:
        require(self.num_actors > 0, "evaluate.num_actors", self.num_actors, "1 or more")
        require(self.gpus_per_actor >= 0, "evaluate.gpus_per_actor", self.gpus_per_actor, "0 or more")
        require(self.rows_per_forward > 0, "evaluate.rows_per_forward", self.rows_per_forward, "1 or more")
        require(self.max_new_tokens > 0, "evaluate.max_new_tokens", self.max_new_tokens, "1 or more")
        require(self.judge_timeout > 0, "evaluate.judge_timeout", self.judge_timeout, "a positive number of seconds")
        require(self.judge_retries >= 0, "evaluate.judge_retries", self.judge_retries, "0 or more")
        require(self.judge_concurrency > 0, "evaluate.judge_concurrency", self.judge_concurrency, "1 or more")
        if self.judge == "classifier":
            require(bool(self.classifier), "evaluate.classifier", self.classifier, "a checkpoint folder or hub name")
        if self.judge == "endpoint":
            require(bool(self.judge_model), "evaluate.judge_model", self.judge_model, "the name of a model")

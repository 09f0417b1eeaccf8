"""Settings of the held-out evaluation and its judge."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from moe_ray.config.auto import Auto
from moe_ray.config.fields import setting
from moe_ray.config.section import Section
from moe_ray.config.values import WrongSettings


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Section):
    """Held-out evaluation: answers, losses, and who judges the answers."""

    group: ClassVar[str] = "evaluate"

    routing: tuple[Literal["natural", "masked", "union"], ...] = setting(
        ("natural",),
        "how held-out prompts are routed, one after the other where several are listed: natural = as the model routes; "
        "masked = only to the unsafe experts of the training batch that the prompt is assigned to; union = only to experts "
        "that are unsafe in any batch",
        affects="answers",
    )
    num_actors: int | Auto = setting(  # noqa: RUF009
        "auto",
        "processes that answer at the same time, each with a copy of the model; auto = as many as the GPUs "
        "have room for, and without GPUs one on each node",
        affects="speed",
        at_least=1,
    )
    gpus_per_actor: float | Auto = setting(  # noqa: RUF009
        "auto",
        "GPUs of one process; auto = as many as the model's weights need, where the cluster has GPUs; 0 = CPU",
        affects="speed",
        at_least=0,
    )
    tokens_per_forward: int = setting(
        8192,
        "tokens that are answered or scored at once, padding included: for an answer those of the prompt and "
        "max_new_tokens of each example, for a loss those of prompt and target; halved by a process whose GPU runs out of "
        "memory",
        affects="speed",
        at_least=1,
    )
    max_new_tokens: int = setting(32, "longest answer, in tokens", affects="answers", at_least=1)
    neutral_file: str = setting(
        "",
        "plain text on harmless topics, with an empty line between paragraphs; the loss on it shows what the model "
        "forgot; empty = the paragraphs that ship with moe-ray",
        affects="answers",
    )
    judge: Literal["phrases", "classifier", "endpoint"] = setting(
        "phrases",
        "who says whether an answer refuses: phrases = refusal phrases in its opening; classifier = a Hugging Face "
        "sequence classifier; endpoint = an OpenAI-compatible chat endpoint, whose address and key are in the "
        "environment variables MOE_RAY_JUDGE_URL and MOE_RAY_JUDGE_KEY",
        affects="verdicts",
    )
    classifier: str = setting(
        "", "judge classifier: its checkpoint folder or name on the Hugging Face hub", affects="verdicts"
    )
    classifier_input: Literal["prompt_and_answer", "answer"] = setting(
        "prompt_and_answer",
        "judge classifier: what it reads; prompt_and_answer = the last message and the answer as a pair of texts",
        affects="verdicts",
    )
    refusal_label: str = setting(
        "REJECTION", "judge classifier: which of its labels means that the answer refuses", affects="verdicts"
    )
    judge_model: str = setting("", "judge endpoint: name of the model that it should use", affects="verdicts")
    judge_timeout: float = setting(60.0, "judge endpoint: seconds to wait for one reply", affects="speed", above=0)
    judge_retries: int = setting(
        3, "judge endpoint: how often a failed call is repeated, with growing pauses", affects="speed", at_least=0
    )
    judge_concurrency: int = setting(4, "judge endpoint: calls at the same time", affects="speed", at_least=1)

    def __post_init__(self) -> None:
        """Checks every field; says what has become of a word that was valid once.

        Raises:
            WrongSettings: with all faults.
        """
        if self.routing in ("both", ("both",), ["both"]):
            raise WrongSettings(self.wrong("routing", "[natural,masked], or any list of natural, masked, union"))
        super().__post_init__()

    def faults(self) -> Iterator[str]:
        """Yields what is wrong with the list of routings, and what the chosen judge misses."""
        if not self.routing or len(set(self.routing)) < len(self.routing):
            yield self.wrong("routing", "a list of some of natural, masked, union, each once, such as [natural,masked]")
        if self.judge == "classifier" and not self.classifier:
            yield self.wrong("classifier", "a checkpoint folder or hub name, since evaluate.judge=classifier")
        if self.judge == "endpoint" and not self.judge_model:
            yield self.wrong("judge_model", "the name of a model, since evaluate.judge=endpoint")

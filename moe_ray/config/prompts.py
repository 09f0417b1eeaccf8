"""Settings of the prompts and batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from moe_ray.config.fields import EMBEDDED, setting
from moe_ray.config.section import Section


@dataclass(frozen=True, kw_only=True)
class PromptsConfig(Section):
    """Where examples come from and how they are grouped into batches."""

    group: ClassVar[str] = "prompts"

    files: tuple[str, ...] = setting(
        (EMBEDDED,),
        "JSONL, JSON or Parquet files whose rows have `label` (safe or unsafe) and `prompt` or `messages`, or whose rows "
        "are pairs of `goal` and `all_prompt`; 'embedded' = the prompts that ship with moe-ray",
        affects="examples",
    )
    paired_records: Literal["pair", "goal", "attack"] = setting(
        "pair",
        "what a row with `goal` and `all_prompt` gives: pair = the goal as a safe example and the attack as an unsafe "
        "one, in the same batch; goal or attack = only that text, labelled unsafe",
        affects="examples",
    )
    safe_per_batch: int = setting(8, "safe examples in a batch", affects="examples", at_least=1)
    unsafe_per_batch: int = setting(8, "unsafe examples in a batch", affects="examples", at_least=1)
    by_category: bool = setting(
        True, "fill a batch from one category only, where examples have a category", affects="examples"
    )
    test_fraction: float = setting(
        0.25,
        "fraction of the examples that is held out for evaluation; a row with a `split` of its own stays in that split",
        affects="examples",
        above=0,
        below=1,
    )
    validation_fraction: float = setting(
        0.0,
        "fraction of the training examples that is held out for validation, unless a row names the split `validation`; "
        "a sweep, rounds and finetune.patience need such examples",
        affects="examples",
        at_least=0,
        below=1,
    )
    keep_pairs: Literal["all", "jailbroken"] = setting(
        "all",
        "which pairs are used, held-out ones too: jailbroken = only those whose safe form the model refuses and whose "
        "attack it complies with, as evaluate.judge says; examples without a partner are always used",
        affects="examples",
    )
    max_batches: int = setting(0, "use at most this many batches; 0 = all", affects="examples", at_least=0)
    max_test_examples: int = setting(
        0, "use at most this many held-out examples of each label; 0 = all", affects="examples", at_least=0
    )
    refusal: str = setting(
        "I'm sorry, but I can't help with that.",
        "answer to train towards for unsafe examples that come without a `target`",
        affects="targets",
    )
    allow_complying_targets: bool = setting(
        False,
        "go on where most targets of unsafe examples do not look like refusals, as in benchmarks whose `target` is the "
        "beginning of an answer that complies",
        affects="speed",
    )
    own_answer_tokens: int = setting(
        128,
        "safe examples that come without a `target` are trained towards the model's own answer, which is cut off after "
        "this many tokens",
        affects="targets",
        at_least=1,
    )

    def faults(self) -> Iterator[str]:
        """Yields what is wrong with files and the refusal."""
        if not self.files:
            yield self.wrong("files", "at least one file, or 'embedded'")
        if not self.refusal.strip():
            yield self.wrong("refusal", "a non-empty text")

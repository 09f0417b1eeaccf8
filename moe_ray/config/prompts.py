"""Settings of the prompts and batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from moe_ray.config.fields import EMBEDDED, setting
from moe_ray.config.section import Section

FIELDS = ("prompt", "messages", "label", "id", "category", "response", "target", "split", "topic", "template", "pair")
"""What `prompts.fields` may name a column for."""


@dataclass(frozen=True, kw_only=True)
class PromptsConfig(Section):
    """Where examples come from and how they are grouped into batches."""

    group: ClassVar[str] = "prompts"

    files: tuple[str, ...] = setting(
        (EMBEDDED,),
        "CSV, TSV, JSONL, JSON or Parquet files, as paths, patterns with `*`, or URLs such as s3://, gs://, https:// and "
        "hf://datasets/NAME/FILE; rows have `label` (safe or unsafe) and `prompt` or `messages`, or are pairs of `goal` and "
        "`all_prompt`, or are of a published benchmark's form, see docs/prompts.md; 'embedded' = the prompts that ship with "
        "moe-ray",
        affects="examples",
    )
    fields: Mapping[str, Any] = setting(
        {},
        "which column says what where files have names of their own, such as {prompt: text, label: is_toxic}; for a file "
        "that has the column of the prompt this goes before any known form",
        affects="examples",
    )
    labels: Mapping[str, Any] = setting(
        {},
        "which values of the label's column stand for what, such as {harmful: unsafe, unharmful: safe} or {1: unsafe, 0: "
        "safe}",
        affects="examples",
    )
    file_labels: Mapping[str, Any] = setting(
        {},
        "the label of all rows of a file whose name, or else whose folder's name, has this part, such as {benign: safe, "
        "toxic: unsafe}, where no column says it",
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
        """Yields what is wrong with files, names, labels and the refusal."""
        if not self.files:
            yield self.wrong("files", "at least one file, or 'embedded'")
        unknown = [name for name in self.fields if name not in FIELDS]
        if unknown:
            yield self.wrong("fields", f"names among {', '.join(FIELDS)}, each with a column")
        if not all(isinstance(column, str) and column.strip() for column in self.fields.values()):
            yield self.wrong("fields", "the name of a column for each of our names")
        for name in ("labels", "file_labels"):
            if not all(label in ("safe", "unsafe") for label in getattr(self, name).values()):
                yield self.wrong(name, "safe or unsafe for each value")
        if not self.refusal.strip():
            yield self.wrong("refusal", "a non-empty text")

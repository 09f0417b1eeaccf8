"""Settings of the prompts and batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe_ray.config.fields import EMBEDDED, _setting, require


@dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """Where examples come from and how they are grouped into batches."""

    files: tuple[str, ...] = _setting(
        (EMBEDDED,),
        "JSONL, JSON or Parquet files with `prompt` or `messages`, `label`, …, or paired `goal` + `all_prompt`",
    )
    paired_records: Literal["pair", "goal", "attack"] = _setting(
        "pair",
        "what a goal + all_prompt record gives: pair = safe goal and unsafe attack in one batch; "
        "goal or attack = only that text, labelled unsafe",
    )
    safe_per_batch: int = _setting(8, "safe examples in a batch")
    unsafe_per_batch: int = _setting(8, "unsafe examples in a batch")
    by_category: bool = _setting(True, "keep a batch to one category where examples have categories")
    test_fraction: float = _setting(
        0.25, "share of examples held out for evaluation where files carry no `split` (0 to 1)"
    )
    validation_fraction: float = _setting(
        0.0,
        "share of training examples held out for validation where no file names a `validation` split; sweep, rounds and "
        "patience need one (0 to 1)",
    )
    keep_pairs: Literal["all", "jailbroken"] = _setting(
        "all",
        "which pairs are used, held-out ones too: jailbroken = those whose safe form the model refuses and whose attack "
        "it complies with, as evaluate.judge says; single examples are always used",
    )
    max_batches: int = _setting(0, "use at most this many batches; 0 = all")
    max_test_examples: int = _setting(0, "use at most this many held-out examples of each label; 0 = all")
    refusal: str = _setting(
        "I'm sorry, but I can't help with that.", "target response of unsafe examples that come without one"
    )
    own_answer_tokens: int = _setting(
        48, "length in tokens of the model's own answer, which is the target of safe examples that come without one"
    )

    def __post_init__(self) -> None:
        require(bool(self.files), "prompts.files", self.files, "at least one file, or 'embedded'")
        require(self.safe_per_batch > 0, "prompts.safe_per_batch", self.safe_per_batch, "1 or more")
        require(self.unsafe_per_batch > 0, "prompts.unsafe_per_batch", self.unsafe_per_batch, "1 or more")
        require(0 < self.test_fraction < 1, "prompts.test_fraction", self.test_fraction, "a fraction between 0 and 1")
        require(
            0 <= self.validation_fraction < 1,
            "prompts.validation_fraction",
            self.validation_fraction,
            "a fraction from 0 to below 1",
        )
        require(self.max_batches >= 0, "prompts.max_batches", self.max_batches, "0 or more")
        require(self.max_test_examples >= 0, "prompts.max_test_examples", self.max_test_examples, "0 or more")
        require(self.own_answer_tokens > 0, "prompts.own_answer_tokens", self.own_answer_tokens, "1 or more")
        require(bool(self.refusal.strip()), "prompts.refusal", self.refusal, "a non-empty text")

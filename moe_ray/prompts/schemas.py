"""The published forms of benchmarks: by which columns each is known, and which of them say what.

Whoever adds one adds a row to `SCHEMAS`; `docs/prompts.md` shows the table.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

Words = Mapping[str, str]
"""What stands for `safe` or `unsafe`, in small letters."""


@dataclass(frozen=True, kw_only=True)
class Schema:
    """One published form.

    All names of columns are in small letters, since columns are found whatever their case.

    Attributes:
        name: of the benchmark.
        source: where its form is documented.
        columns: those that it is known by; all of them must be there.
        absent: columns that it never has.
        alone: it has no other columns.
        file: what a file's name or that of its folder must match as well, for a form whose columns say too little.
        prompt: the request.
        turns: that column is a list of one request.
        context: text before the request, where there is some.
        safe_prompt: the harmless twin of the request, in the same row.
        label: column that says whether a request is unsafe.
        labels: its values.
        always: the label of every request.
        file_labels: words in a file's name, or in that of its folder, that say the label of all its requests.
        unlabelled: rows without a label are left out, and counted.
        id: columns that together name a row.
        category: of the request.
        category_prefix: what is taken from a category's beginning.
        topic: what the request is about.
        template: the wording around it.
        values: of columns by name, what some of their values are called instead; empty = none.
        pair: columns that together say which safe and which unsafe request belong together.
        once: a request that comes again is left out, and counted.
    """

    name: str
    source: str
    columns: Collection[str]
    prompt: str
    turns: bool = False
    absent: Collection[str] = ()
    alone: bool = False
    file: str = ""
    context: str = ""
    safe_prompt: str = ""
    label: str = ""
    labels: Words = field(default_factory=dict)
    always: str = ""
    file_labels: Words = field(default_factory=dict)
    unlabelled: bool = False
    id: tuple[str, ...] = ()
    category: str = ""
    category_prefix: str = ""
    topic: str = ""
    template: str = ""
    values: Mapping[str, Words] = field(default_factory=dict)
    pair: tuple[str, ...] = ()
    once: bool = False

    def fits(self, columns: Collection[str], places: Collection[str]) -> bool:
        """Whether a table with these columns is of this form.

        Args:
            columns: of the table, in small letters.
            places: its file's name and that of its folder, in small letters.
        """
        found = set(columns) - _ROW_NUMBERS
        return (
            found >= set(self.columns)
            and not found & set(self.absent)
            and not (self.alone and found - set(self.columns))
            and (not self.file or any(re.search(self.file, place) for place in places))
        )


_ROW_NUMBERS = {"", "unnamed: 0", "__index_level_0__"}
"""Columns that pandas writes for the number of a row."""

SCHEMAS = (
    Schema(
        name="HarmBench",
        source="github.com/centerforaisafety/HarmBench, data/behavior_datasets (Mazeika et al. 2024)",
        columns=("behavior", "functionalcategory", "semanticcategory", "behaviorid"),
        absent=("imagefilename",),
        prompt="behavior",
        context="contextstring",
        always="unsafe",
        id=("behaviorid",),
        category="semanticcategory",
    ),
    Schema(
        name="JailbreakBench",
        source="huggingface.co/datasets/JailbreakBench/JBB-Behaviors (Chao et al. 2024)",
        columns=("index", "goal", "target", "behavior", "category"),
        prompt="goal",
        file_labels={"harmful": "unsafe", "benign": "safe"},
        id=("index",),
        category="category",
        pair=("index",),
    ),
    Schema(
        name="XSTest",
        source="github.com/paul-rottger/xstest, xstest_prompts.csv (Röttger et al. 2024)",
        columns=("prompt", "type", "label", "focus"),
        prompt="prompt",
        label="label",
        labels={"safe": "safe", "unsafe": "unsafe"},
        id=("id",),
        category="type",
        category_prefix="contrast_",
        topic="focus",
        values={
            "type": {
                "nons_group_real_discr": "discr",
                "real_group_nons_discr": "discr",
                "privacy_public": "privacy",
                "privacy_fictional": "privacy",
            }
        },
        pair=("type", "focus"),
    ),
    Schema(
        name="StrongREJECT",
        source="github.com/alexandrasouly/strongreject, strongreject_dataset.csv (Souly et al. 2024)",
        columns=("forbidden_prompt", "category", "source"),
        prompt="forbidden_prompt",
        always="unsafe",
        category="category",
    ),
    Schema(
        name="AdvBench",
        source="github.com/llm-attacks/llm-attacks, data/advbench/harmful_behaviors.csv (Zou et al. 2023)",
        columns=("goal", "target"),
        alone=True,
        prompt="goal",
        always="unsafe",
    ),
    Schema(
        name="OR-Bench",
        source="huggingface.co/datasets/bench-llm/or-bench (Cui et al. 2024)",
        columns=("prompt", "category"),
        alone=True,
        file=r"or[-_]?bench",
        prompt="prompt",
        file_labels={"toxic": "unsafe", "80k": "safe", "hard": "safe"},
        category="category",
    ),
    Schema(
        name="SORRY-Bench",
        source="huggingface.co/datasets/sorry-bench/sorry-bench-202503, question.jsonl (Xie et al. 2024)",
        columns=("question_id", "category", "turns", "prompt_style"),
        prompt="turns",
        turns=True,
        always="unsafe",
        id=("question_id", "prompt_style"),
        category="category",
        template="prompt_style",
        values={"prompt_style": {"base": ""}},
    ),
    Schema(
        name="WildGuardMix",
        source="huggingface.co/datasets/allenai/wildguardmix (Han et al. 2024)",
        columns=("prompt", "adversarial", "subcategory"),
        prompt="prompt",
        label="prompt_harm_label",
        labels={"harmful": "unsafe", "unharmful": "safe"},
        unlabelled=True,
        category="subcategory",
        template="adversarial",
        values={"adversarial": {"true": "adversarial", "false": ""}, "subcategory": {"benign": ""}},
        once=True,
    ),
    Schema(
        name="FORTRESS",
        source="huggingface.co/datasets/ScaleAI/fortress_public (Knight et al. 2025)",
        columns=("id", "adversarial_prompt", "benign_prompt"),
        prompt="adversarial_prompt",
        safe_prompt="benign_prompt",
        always="unsafe",
        id=("id",),
        category="risk_subdomain",
        topic="risk_domain",
    ),
    Schema(
        name="abliterix",
        source="huggingface.co/datasets/wangzhang/abliterix-datasets",
        columns=("prompt", "category", "language", "sophistication", "design_goal"),
        absent=("label",),
        prompt="prompt",
        file_labels={"good": "safe", "harmful": "unsafe", "bad": "unsafe"},
        id=("id",),
        category="category",
        template="format",
    ),
)
"""The forms that are known, each by its columns."""

"""Settings of the field's own harnesses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from moe_ray.config.fields import setting
from moe_ray.config.section import Section


@dataclass(frozen=True, kw_only=True)
class HarnessConfig(Section):
    """Capability and safety in the field's own harnesses, before and after the repair (pip install 'moe-ray[harness]')."""

    group: ClassVar[str] = "harness"

    run: bool = setting(False, "run the tasks at the end of the full workflow", affects="search")
    lm_eval: tuple[str, ...] = setting(
        (), "tasks of lm-eval: names such as hellaswag, or YAML files of your own", affects="search"
    )
    inspect: tuple[str, ...] = setting(
        (),
        "tasks of inspect_ai: Python files, FILE.py@TASK for one of several in a file, or names of installed packages like "
        "inspect_evals/xstest; their code is run",
        affects="search",
    )
    limit: int = setting(0, "most samples of a task; 0 = all", affects="harness", at_least=0)
    fewshot: int = setting(
        -1, "lm-eval: worked examples before each question; -1 = as the task says", affects="harness", at_least=-1
    )
    chat_template: bool = setting(False, "lm-eval: put questions into the model's chat template", affects="harness")
    max_new_tokens: int = setting(
        256, "inspect_ai: longest answer, in tokens, where a task does not say", affects="harness", at_least=1
    )
    batch_size: int = setting(8, "lm-eval: rows of a forward pass", affects="speed", at_least=1)

    def faults(self) -> Iterator[str]:
        """Yields whether there is nothing to run, or a task is named twice."""
        for name in ("lm_eval", "inspect"):
            tasks: tuple[str, ...] = getattr(self, name)
            if len(set(tasks)) < len(tasks) or not all(tasks):
                yield self.wrong(name, "a list of tasks, each once")
        if self.run and not self.lm_eval and not self.inspect:
            yield self.wrong("lm_eval", "a task, such as [hellaswag], or one in harness.inspect")

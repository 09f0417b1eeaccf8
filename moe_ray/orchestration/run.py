"""A run: one call per stage, each reading what the ones before it made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moe_ray.config.ablate import AblateConfig
from moe_ray.config.model import ModelConfig
from moe_ray.config.run import Config
from moe_ray.evaluation.judge_check import measured_check
from moe_ray.models.loading import uniform_loss
from moe_ray.orchestration.stages import (
    ablate,
    attack,
    capture,
    compare,
    evaluate,
    finetune,
    harness,
    identify,
    prepare,
    sweep,
)
from moe_ray.orchestration.stages.context import Context
from moe_ray.organisms.recovery import known_recovery
from moe_ray.prompts.prompt_set import Prompts
from moe_ray.report.summary import build_summary
from moe_ray.run_directory import (
    CAPTURE,
    COMPARE,
    FINETUNE,
    IDENTIFY,
    PAIRS,
    PROMPTS,
    SWEEP,
    RunDirectory,
    When,
    figures_of,
)
from moe_ray.storage.stage import Outcome
from moe_ray.studies.search_space import winning_config


class Run(Context):
    """One run; see `Context` for what it is made of.

    Attributes:
        await_model: called before the first stage; returns when the checkpoint is there.
        at_end: what is done when Ray has been stopped, such as showing the results.
    """

    def __init__(self, config: Config, model: ModelConfig, prompts: Prompts, directory: RunDirectory) -> None:
        super().__init__(config, model, prompts, directory)
        self.await_model: Callable[[], None] = lambda: None
        self.at_end: list[Callable[[], None]] = []

    def with_config(self, config: Config) -> Run:
        """The same run, its directory and what it has done so far, with other settings of what comes next."""
        other = Run(config, self.model, self.prompts, RunDirectory(self.directory.folder))
        other.outcomes, other.around, other.models = dict(self.outcomes), self.around, self.models
        other.seconds, other.await_model, other.at_end = self.seconds, self.await_model, self.at_end
        other.asked, other.room = self.asked, self.room
        return other

    @property
    def reused(self) -> list[str]:
        """The stages that an earlier run had done."""
        return [name for name, outcome in self.outcomes.items() if outcome.is_reused]

    def prepare(self) -> Outcome:
        """Batches and held-out examples, with a target for each."""
        self.await_model()
        return prepare.prepare(self)

    def capture(self) -> Outcome:
        """Routing counts of every example."""
        return capture.capture(self)

    def identify(self) -> Outcome:
        """Risk differences, unsafe experts and masks of every batch."""
        return identify.identify(self)

    def ablate(self, config: AblateConfig | None = None) -> Outcome:
        """The causal check of the selection, as configured or as given."""
        return ablate.ablate(self, self.config.ablate if config is None else config)

    def affordable_check(self) -> AblateConfig | None:
        """What of the causal check is done unasked; None = nothing."""
        return ablate.affordable(self)

    def finetune(self) -> Outcome:
        """The learned experts."""
        return finetune.finetune(self)

    def evaluate(self, when: When) -> Outcome:
        """Verdicts and figures on held-out examples, before or after the repair."""
        return evaluate.evaluate(self, when)

    def sweep(self) -> Outcome:
        """The trials of the sweep, ranked, and the winner's settings."""
        return sweep.sweep(self)

    def winner(self) -> Run:
        """This run with the settings of the sweep's winner."""
        return self.with_config(winning_config(self.config, self.outcomes[SWEEP].notes["winner"]))

    def compare(self) -> compare.Comparison:
        """Per-batch masks and the baselines, and where asked for what transfers between categories."""
        with self.seconds.spent_on(COMPARE):
            return compare.compare(self)

    def attack(self) -> Outcome:
        """Answers of both models under attacks, and their figures."""
        return attack.attack_model(self)

    def harness(self) -> Outcome:
        """Scores of both models on tasks of harnesses."""
        return harness.harness(self)

    def summary(self) -> dict[str, Any]:
        """What `summary.json` holds, but for the tracking run and the total time."""
        directory, notes = self.directory, {name: outcome.notes for name, outcome in self.outcomes.items()}
        after = notes[figures_of("after")]
        return build_summary(
            masks=directory.masks,
            num_examples=len(directory.stored_batches) - notes[CAPTURE]["quarantined"],
            num_experts_per_tok=directory.num_experts_per_tok,
            tuned=notes[FINETUNE],
            before=notes[figures_of("before")]["metrics"],
            after=after["metrics"],
            change=after["change"],
            pairs=notes.get(PAIRS),
            certainty=directory.certainty,
        ) | {
            "prompt_files": [table.to_record() for table in self.prompts.tables],
            "judge": {"name": self.config.evaluate.judge, "check": measured_check(self.config.evaluate)},
            "quarantined_examples": notes[CAPTURE]["quarantined"],
            "controls": notes[IDENTIFY].get("controls") or {},
            "experts_are_copies": notes[CAPTURE].get("experts_are_copies"),
            "held_out_left_out": notes[PROMPTS]["left_out"],
            "uniform_loss": uniform_loss(self.model),
            "truth": known_recovery(self.model.path, directory.masks, directory.categories),
        }

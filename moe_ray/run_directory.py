"""The run directory: what a run keeps where, and typed readers of what is there.

    config.yaml               the resolved configuration
    prompts/                  batches and held-out examples
    capture/                  routing counts, quarantined examples, generated responses
    identify/                 risk differences, unsafe experts, masks
    ablate/                   what the answers lose without the selected experts
    finetune/                 learned experts, history, rounds
    attack/                   answers under attacks, and their figures
    harness/                  scores of tasks of lm-eval and inspect_ai
    evaluate/before/, after/  held-out answers, and the figures of them
    sweep/, compare/          trials and the winner; one folder per arm, and the table
    own_answers/, pairs/      the model's answers that are targets, or that say which pairs are kept

Every folder and file name that more than one module knows is here, once. The name of a file with a form of its own
(`batches.parquet`, `masks.npz`, `history.jsonl`, …) belongs to the module that reads and writes that form, and a name that a
single module uses, such as a job's working folder, is a constant there.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import fsspec
import numpy as np
import pandas as pd

from moe_ray.config.identify import IdentifyConfig
from moe_ray.config.io import parse_config, to_yaml
from moe_ray.config.run import Config
from moe_ray.errors import InputError
from moe_ray.experts import ExpertMasks
from moe_ray.finetuning.adapter_files import HEADER
from moe_ray.finetuning.history import HISTORY, read_steps
from moe_ray.identification.controls import CONTROLS
from moe_ray.identification.findings import CERTAINTY
from moe_ray.identification.mask_files import MASKS, read_masks
from moe_ray.identification.overlap import categories_of_batches, expert_categories
from moe_ray.identification.risk_tables import RiskParts
from moe_ray.prompts.example_tables import BATCHES, frame_to_examples
from moe_ray.prompts.examples import Example
from moe_ray.prompts.quarantine import QUARANTINE, TRUNCATED, training_examples, without_quarantined
from moe_ray.prompts.stored_batches import StoredBatches
from moe_ray.routing.count_store import parts_info, read_counts, read_lengths
from moe_ray.routing.counts import RoutingCounts
from moe_ray.run_plots import RunPlots
from moe_ray.storage.damage import reading
from moe_ray.storage.folder import Folder
from moe_ray.storage.protocols import cure_of
from moe_ray.storage.stage import is_finished, read_manifest

When = Literal["before", "after"]
"""Of the repair."""
WHENS: tuple[When, ...] = ("before", "after")

PROMPTS, CAPTURE, IDENTIFY = "prompts", "capture", "identify"
FINETUNE, SWEEP, COMPARE = "finetune", "sweep", "compare"
ABLATE, ATTACK, HARNESS = "ablate", "attack", "harness"
PAIRS, OWN_ANSWERS = "pairs", "own_answers"
PARITY = "parity.json"
"""In the capture folder: how an engine's routes agree with transformers'."""
ABOUT_MODEL = "model.json"
"""In the capture folder, before any count: what the model that was counted is like."""
COUNTS, RESPONSES = f"{CAPTURE}/counts", f"{CAPTURE}/responses"
REJECTED, SHORTENED, ATTEMPTS = f"{CAPTURE}/rejected", f"{CAPTURE}/shortened", f"{CAPTURE}/attempts"
"""These three are there only while a capture is unfinished."""
PARTS, VERDICTS = "parts", "verdicts"
"""In a stage's folder: answers, and verdicts, in the parts in which they came."""
CONFIG, SUMMARY, REPORT = "config.yaml", "summary.json", "report.html"
TEST, VALIDATION, LEFT_OUT = "test.parquet", "validation.parquet", "left_out.parquet"
RISK, ANSWERS, PAIR_OUTCOMES = "risk_differences.parquet", "answers.parquet", "pairs.parquet"
EFFECTS = "effects.parquet"
ABLATION_TABLE, ABLATION_BATCHES, ABLATION_EXPERTS = "table.csv", "batches.csv", "experts.csv"
TRIALS, WINNER, HEAT_MAP = "trials.parquet", "winner.yaml", "heat_map"
HEAT_MAP_PICTURES = f"{HEAT_MAP}.png", f"{HEAT_MAP}.svg"
TRIAL_FOLDERS, RECORDS = "trials", "records"
COMPARISON, TRANSFER_TABLE, VERDICT = "comparison.parquet", "transfer.parquet", "verdict.json"


def answers_of(when: When) -> str:
    """The folder of held-out answers, losses and routing, before they are judged."""
    return f"evaluate/{when}/answers"


def figures_of(when: When) -> str:
    """The folder of judged answers and their figures."""
    return f"evaluate/{when}/figures"


def round_folder(number: int | str) -> str:
    """The folder of a round of fine-tuning, from 1; `*` for all."""
    return f"{FINETUNE}/round_{number}"


STAGES = (
    *(PAIRS, PROMPTS, CAPTURE, SWEEP, IDENTIFY, ABLATE),
    *(answers_of("before"), figures_of("before"), FINETUNE, answers_of("after"), figures_of("after")),
    ATTACK,
    HARNESS,
)
"""Folders of stages, in the order in which a run makes them."""


@dataclass(frozen=True, repr=False)
class RunDirectory(RunPlots):
    """A run directory. Readers raise InputError, naming the stage to run, where what they read is not there.

    Attributes:
        folder: the directory.
    """

    folder: Folder

    @classmethod
    def open(cls, url: str) -> RunDirectory:
        """The run directory at a local path or URL; made if missing, for its owner alone: it holds prompts and answers.

        Raises:
            InputError: it cannot be written to.
        """
        return cls(Folder.open(url, private=True))

    def __repr__(self) -> str:
        return f"RunDirectory({self.folder.url}, finished: {', '.join(self.stages) or 'no stage'})"

    def sub(self, name: str) -> Folder:
        """One of the folders named in this module, made if missing."""
        return self.folder.sub(name)

    def holds(self, name: str, file: str) -> bool:
        """Whether a folder holds a file; makes nothing."""
        return self.folder.exists(f"{name}/{file}")

    def _require(self, name: str, file: str) -> Folder:
        """The folder, which holds the file; InputError where it does not."""
        if not self.holds(name, file):
            command = name.partition("/")[0]
            stage = "prepare" if command in (PROMPTS, PAIRS, OWN_ANSWERS) else command
            raise InputError(
                f"{self.folder.url} holds no {name}/{file}; give the directory of a run that finished the stage "
                f"{stage!r} (moe-ray {stage})"
            )
        return self.folder.sub(name)

    # Settings

    def write_config(self, config: Config) -> None:
        """Writes the resolved configuration."""
        self.folder.write_bytes(CONFIG, to_yaml(config).encode())

    @cached_property
    def config(self) -> Config:
        """The run's configuration."""
        if not self.folder.exists(CONFIG):
            raise InputError(f"{self.folder.url} holds no {CONFIG}; give the directory of a run")
        path = self.folder.file(CONFIG)
        with reading(path, expected="the settings of a run", cure="give the directory of a run"):
            text = self.folder.read_bytes(CONFIG).decode()
            if not text.strip():
                raise ValueError("it is empty")
        return parse_config(text, source=path)

    @cached_property
    def identify_config(self) -> IdentifyConfig:
        """The settings that the experts were selected with; after a sweep the winner's, while `config` has others."""
        prefix = f"{IDENTIFY}."
        stored = self.manifest(IDENTIFY)
        settings: dict[str, Any] = {
            key.removeprefix(prefix): tuple(value) if isinstance(value, list) else value
            for key, value in ({} if stored is None else stored["inputs"]).items()
            if key.startswith(prefix)
        }
        return IdentifyConfig(**settings) if settings else self.config.identify

    # Prompts

    @cached_property
    def batches(self) -> pd.DataFrame:
        """The training examples, a row each, quarantined ones too."""
        return self._require(PROMPTS, BATCHES).read_frame(
            BATCHES, needs=("batch_idx", "in_batch_idx", "id", "label", "messages")
        )

    @property
    def test(self) -> pd.DataFrame:
        """The held-out examples that the figures are about."""
        return self._require(PROMPTS, TEST).read_frame(TEST)

    @property
    def validation(self) -> pd.DataFrame | None:
        """The held-out examples that settings are chosen on; None = the run has none."""
        return self.sub(PROMPTS).read_frame(VALIDATION) if self.holds(PROMPTS, VALIDATION) else None

    @property
    def validation_examples(self) -> list[Example]:
        """The rows of `validation`."""
        return [] if self.validation is None else frame_to_examples(self.validation)

    @property
    def stored_batches(self) -> StoredBatches:
        """The training examples, of which parts can be read without the rest."""
        return StoredBatches(self._require(PROMPTS, BATCHES))

    @cached_property
    def categories(self) -> dict[int, str]:
        """Per `batch_idx` the category of its unsafe examples, or `mixed`."""
        return categories_of_batches(self.stored_batches.columns("batch_idx", "label", "category"))

    # Routing counts

    @property
    def counts_folder(self) -> Folder:
        """The stored counts, in parts; see `count_store`."""
        return self.sub(COUNTS)

    @property
    def captured_examples(self) -> pd.DataFrame:
        """The training examples that were counted: those of the batches without the quarantined ones."""
        return without_quarantined(self.batches, self._require(CAPTURE, QUARANTINE).read_frame(QUARANTINE))

    def askable(self, examples: pd.DataFrame) -> pd.DataFrame:
        """Of training examples those that were counted whole: neither in quarantine nor cut."""
        capture = self._require(CAPTURE, QUARANTINE)
        for name in (QUARANTINE, TRUNCATED):
            examples = without_quarantined(examples, capture.read_frame(name))
        return examples

    @property
    def training_examples(self) -> pd.DataFrame:
        """The examples that can be trained on; see `quarantine.training_examples`."""
        capture = self._require(CAPTURE, QUARANTINE)
        return training_examples(self.batches, capture.read_frame(QUARANTINE), capture.read_frame(TRUNCATED))

    @property
    def num_experts_per_tok(self) -> int:
        """The router's k."""
        return parts_info(self.counts_folder).num_experts_per_tok

    @cached_property
    def counts(self) -> RoutingCounts:
        """The routing counts of the batches that have masks."""
        counts = read_counts(self.counts_folder)
        return counts.take(np.isin(counts.batch_idx, self.masks.batch_idx))

    @property
    def lengths(self) -> RoutingCounts:
        """Counted tokens of each example of the batches that have masks; see `count_store.read_lengths`."""
        return read_lengths(self.counts_folder, self.masks.batch_idx)

    # Unsafe experts

    @cached_property
    def masks(self) -> ExpertMasks:
        """The masks of every batch."""
        return read_masks(self._require(IDENTIFY, MASKS))

    @cached_property
    def risk(self) -> RiskParts:
        """The risk table, with how sure each difference is, in parts."""
        return RiskParts(self._require(IDENTIFY, RISK).sub(RISK))

    @cached_property
    def certainty(self) -> pd.DataFrame:
        """How sure each batch's selection is, a row each; see `findings.Findings`."""
        return self._require(IDENTIFY, CERTAINTY).read_frame(CERTAINTY, needs=("batch_idx", "is_significant"))

    @cached_property
    def controls(self) -> pd.DataFrame | None:
        """What is left of the selection within topics and templates; None = no prompt says its own, or an older run."""
        if not self.holds(IDENTIFY, CONTROLS):
            return None
        table = self.sub(IDENTIFY).read_frame(CONTROLS)
        return table if len(table) else None

    @cached_property
    def by_category(self) -> pd.DataFrame:
        """The experts of each category; see `overlap.expert_categories`."""
        return expert_categories(self.risk, self.masks, self.categories)

    # The causal check

    @cached_property
    def ablation(self) -> dict[str, Any] | None:
        """What the causal check found, as in `summary.json`; None = it was not done."""
        manifest = self.manifest(ABLATE)
        return None if manifest is None else manifest["notes"]

    @cached_property
    def ablated_experts(self) -> pd.DataFrame | None:
        """A row per batch and single expert that was taken away; None = none was."""
        if self.ablation is None or not self.holds(ABLATE, ABLATION_EXPERTS):
            return None
        data = self.sub(ABLATE).read_bytes(ABLATION_EXPERTS)
        return pd.read_csv(io.BytesIO(data)) if data.strip() else None

    # What came of it

    @property
    def learned_experts(self) -> Folder:
        """The folder of the adapter; see `finetuning.adapter_files`."""
        return self._require(FINETUNE, HEADER)

    @cached_property
    def history(self) -> pd.DataFrame | None:
        """The training's steps, a row each; None = nothing was trained."""
        steps = read_steps(self.sub(FINETUNE)) if self.holds(FINETUNE, HISTORY) else []
        return pd.DataFrame(steps) if steps else None

    def answers(self, when: When) -> pd.DataFrame | None:
        """The judged held-out answers before or after the repair; None = they were not evaluated."""
        name = figures_of(when)
        return self.sub(name).read_frame(ANSWERS, needs=("label", "answer")) if self.holds(name, ANSWERS) else None

    @cached_property
    def summary(self) -> dict[str, Any] | None:
        """`summary.json`; None = the run did not get that far."""
        if not self.folder.exists(SUMMARY):
            return None
        summary: dict[str, Any] = self.folder.read_json(SUMMARY)
        with reading(self.folder.file(SUMMARY), expected="the figures of a run"):
            if not isinstance(summary, dict):
                raise TypeError(f"got a {type(summary).__name__}")
        return summary

    @cached_property
    def trials(self) -> pd.DataFrame | None:
        """The trials of the sweep, the best first; None = there was no sweep."""
        return self.sub(SWEEP).read_frame(TRIALS) if self.holds(SWEEP, TRIALS) else None

    @cached_property
    def comparison(self) -> tuple[pd.DataFrame, str] | None:
        """The comparison with baselines, a row per arm and share, and what it says in words; None = there was none."""
        if not self.holds(COMPARE, COMPARISON):
            return None
        folder = self.sub(COMPARE)
        table = folder.read_frame(COMPARISON)
        # One that was written before arms were measured over their steps; the compare workflow makes it anew.
        return (table, str(folder.read_json(VERDICT))) if "share" in table else None

    @cached_property
    def transfer(self) -> pd.DataFrame | None:
        """What training on one category did to every other, see `transfer_table`; None = it was not asked for."""
        return self.sub(COMPARE).read_frame(TRANSFER_TABLE) if self.holds(COMPARE, TRANSFER_TABLE) else None

    # Attacks and harnesses

    @cached_property
    def attacks(self) -> dict[str, Any] | None:
        """What attacks did, as in `summary.json`; None = there were none."""
        manifest = self.manifest(ATTACK)
        return None if manifest is None else manifest["notes"]

    @cached_property
    def harness(self) -> dict[str, Any] | None:
        """What tasks of harnesses scored, as in `summary.json`; None = none was run."""
        manifest = self.manifest(HARNESS)
        return None if manifest is None else manifest["notes"]

    # Stages

    @property
    def stages(self) -> Sequence[str]:
        """The finished stages, in the order in which a run makes them."""
        return [name for name in STAGES if self.manifest(name) is not None]

    def manifest(self, stage: str) -> dict[str, Any] | None:
        """A finished stage's inputs, notes and environment; None = it is not finished."""
        if not self.folder.fs.exists(self.folder.file(stage)):
            return None
        folder = self.folder.sub(stage)
        return read_manifest(folder) if is_finished(folder) else None


def open_run(url: str) -> RunDirectory:
    """A run directory that a run has written to.

    Args:
        url: local path or any fsspec URL.

    Raises:
        InputError: there is none.
    """
    try:
        fs, path = fsspec.url_to_fs(url, use_listings_cache=False)
        is_there = fs.exists(f"{path}/{CONFIG}")
    except Exception as error:  # what a storage's library raises is of its own kind
        cure = cure_of(error, url, "give the run_dir of a run")
        raise InputError(f"{url!r} cannot be opened: {error}; {cure}") from error
    if not is_there:
        raise InputError(f"{url!r} is not a run directory (no {CONFIG}); give the run_dir of a run")
    return RunDirectory.open(url)

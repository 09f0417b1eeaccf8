"""The stages of a run, in order, each reading what the one before wrote.

A stage is reused when its manifest names equal inputs; the inputs of a stage hold a hash of those of the stages before it,
so a change anywhere runs everything after it again, and nothing before it.
"""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property
from typing import Any

import pandas as pd

from moe_ray import report
from moe_ray.artifacts import Folder, content_hash, hash_checkpoint, hash_file, read_masks, write_masks
from moe_ray.baselines import plan_arms
from moe_ray.batches import batches_to_frame, example_to_row, examples_to_frame
from moe_ray.comparison import comparison_table, verdict
from moe_ray.config import EMBEDDED, Config, ModelConfig
from moe_ray.config_io import flatten, with_settings
from moe_ray.export import export_name, export_pickle
from moe_ray.identification import certainty_per_batch
from moe_ray.loading import num_decoder_layers
from moe_ray.orchestration.inputs import Prompts
from moe_ray.routing import RoutingCounts
from moe_ray.rules import select
from moe_ray.selection import ExpertMasks

logger = logging.getLogger(__name__)


class Run:
    """One run: its configuration, its folder, and its stages.

    Args:
        config: the resolved configuration.
        model: the model that is really used; differs from `config.model` when that is the embedded one.
        prompts: from `read_prompts`.
        folder: the run directory.
    """

    def __init__(self, config: Config, model: ModelConfig, prompts: Prompts, folder: Folder) -> None:
        self.config, self.model, self.prompts, self.folder = config, model, prompts, folder
        self.seconds: dict[str, float] = {}
        self.reused: list[str] = []
        self._inputs: dict[str, dict[str, Any]] = {}

    def with_config(self, config: Config) -> Run:
        """The same run, its folder and what it has done so far, with other settings of what comes next."""
        other = Run(config, self.model, self.prompts, self.folder)
        other.seconds, other.reused, other._inputs = self.seconds, self.reused, dict(self._inputs)
        return other

    def _stage(self, name: str, inputs: Mapping[str, Any], work: Callable[[Folder], Mapping[str, Any]]) -> Folder:
        """The stage's folder, with its work done now or before."""
        folder = self.folder.sub(name)
        self._inputs[name] = dict(inputs)
        changed = folder.changed_inputs(inputs)
        if changed == []:
            logger.info("%s: reused from an earlier run", name)
            self.reused.append(name)
            self.seconds[name] = folder.notes()["seconds"]
            return folder
        started_inputs = folder.read_json("started.json") if folder.exists("started.json") else None
        if changed is not None or started_inputs != content_hash(dict(inputs)):
            if changed:
                logger.info("%s: run again, because these inputs changed: %s", name, ", ".join(changed))
            folder.clear()
            folder.write_json("started.json", content_hash(dict(inputs)))
        else:
            logger.info("%s: resuming an unfinished stage", name)
        started = time.perf_counter()
        notes = work(folder)
        self.seconds[name] = round(time.perf_counter() - started, 2)
        folder.finish(inputs, seconds=self.seconds[name], **notes)
        logger.info("%s: done in %.1f s", name, self.seconds[name])
        return folder

    def _after(self, *stages: str) -> str:
        return content_hash([self._inputs[stage] for stage in stages])

    def prepare(self) -> Folder:
        """Batches and held-out examples, with a target for each."""
        settings = self.config.prompts
        files = {name: hash_file(name) for name in settings.files if name != EMBEDDED}
        rows = [example_to_row(e) for batch in self.prompts.assembly.batches for e in batch.examples]
        rows += [example_to_row(example) for example in self.prompts.validation + self.prompts.test]
        inputs = {
            "files": files,
            "examples": content_hash(rows),
            "prompts": asdict(settings),
            "seed": self.config.seed,
            "model": hash_checkpoint(self.model.path, self.model.revision),
        }
        return self._stage("batches", inputs, self._prepare)

    def _prepare(self, folder: Folder) -> dict[str, Any]:
        train = self._with_targets(batches_to_frame(self.prompts.assembly.batches), "own answers, training")
        test = self._with_targets(examples_to_frame(self.prompts.test), "own answers, held out")
        if self.prompts.validation:
            validation = examples_to_frame(self.prompts.validation)
            folder.write_table("validation.parquet", self._with_targets(validation, "own answers, validation"))
        folder.write_table("batches.parquet", train)
        folder.write_table("test.parquet", test)
        return {"examples": len(train), "test_examples": len(test), "left_over": len(self.prompts.assembly.left_over)}

    def _with_targets(self, frame: pd.DataFrame, what: str) -> pd.DataFrame:
        """Fills missing targets: the refusal for unsafe examples, the model's own answer for safe ones."""
        from moe_ray.orchestration.answer import answer

        settings = self.config.prompts
        frame = frame.assign(target=frame["target"].astype(object))
        missing = frame["target"].isna()
        frame.loc[missing & (frame["label"] == "unsafe"), "target"] = settings.refusal
        own = frame[missing & (frame["label"] == "safe")]
        if len(own):
            answers = answer(
                own, self.model, self.config.evaluate, what=what, max_new_tokens=settings.own_answer_tokens
            )
            frame.loc[own.index, "target"] = answers["answer"].to_numpy()
            frame.loc[own.index, "target_complete"] = answers["ended"].to_numpy()
        return frame

    def capture(self) -> Folder:
        """Routing counts of every example."""
        from moe_ray.orchestration.capture import capture

        def work(folder: Folder) -> dict[str, Any]:
            examples = self.prepare_frame("batches.parquet")
            return {"tokens": capture(examples, self.model, self.config.capture, folder.sub("counts"))}

        inputs = {
            "batches": self._after("batches"),
            "dtype": self.model.dtype,
            "experts_implementation": self.model.experts_implementation,
            "weights": self.config.capture.weights,
        }
        return self._stage("routing", inputs, work)

    def identify(self) -> Folder:
        """Risk differences, unsafe experts and masks of every batch."""
        from moe_ray.orchestration.identify import identify

        def work(folder: Folder) -> dict[str, Any]:
            selection = self.config.selection
            risk = identify(self.folder.sub("routing").sub("counts"), selection, seed=self.config.seed)
            folder.write_table("risk_differences.parquet", risk)
            masks = select(risk, selection, seed=self.config.seed)
            write_masks(folder, masks)
            self._export(folder, risk, masks)
            return {"union_experts": len(masks.union_experts), "masks": masks.digest()}

        inputs = {
            "routing": self._after("routing"),
            "selection": asdict(self.config.selection),
            "seed": self.config.seed,
        }
        return self._stage("unsafe_experts", inputs, work)

    def _export(self, folder: Folder, risk: pd.DataFrame, masks: ExpertMasks) -> None:
        data = io.BytesIO()
        export_pickle(
            data,
            masks=masks,
            risk=risk,
            batches=self.prepare_frame("batches.parquet"),
            model_name=self.model.path,
            num_experts_per_tok=self.counts.num_experts_per_tok,
            num_layers=num_decoder_layers(self.model),
            threshold=self.config.selection.threshold,
            top_k=self.config.selection.top_k,
        )
        folder.write_bytes(export_name(self.model.path), data.getvalue())

    def sweep(self) -> Folder:
        """The trials of the sweep, ranked, and the winner's configuration; captures nothing."""
        from moe_ray.orchestration.sweep import SweepJob, sweep, write_results

        def work(folder: Folder) -> dict[str, Any]:
            job = SweepJob(
                model=self.model,
                config=self.config,
                batches_url=self.folder.sub("batches").url,
                counts_url=self.folder.sub("routing").sub("counts").url,
                folder_url=folder.url,
            )
            return write_results(folder, self.config, sweep(job))

        settings = self.config.sweep
        search = {key: value for key, value in asdict(settings).items() if not key.endswith("_per_trial")}
        inputs = {
            "routing": self._after("batches", "routing"),
            "sweep": {key: value for key, value in search.items() if key not in ("run", "max_concurrent_trials")},
            "selection": asdict(self.config.selection),
            "train": asdict(self.config.train),
            "evaluate": asdict(self.config.evaluate),
            "seed": self.config.seed,
        }
        return self._stage("sweep", inputs, work)

    def winner(self) -> Run:
        """This run with the settings of the sweep's winner."""
        notes = self.folder.sub("sweep").notes()
        return self.with_config(winning_config(self.config, notes["winner"]))

    def finetune(self) -> Folder:
        """The learned experts."""
        from moe_ray.orchestration.finetune import FineTuneJob, finetune
        from moe_ray.orchestration.rounds import Rounds

        def work(folder: Folder) -> dict[str, Any]:
            job = FineTuneJob(
                model=self.model,
                config=self.config.train,
                seed=self.config.seed,
                batches_url=self.folder.sub("batches").url,
                masks_url=self.folder.sub("unsafe_experts").url,
                out_url=folder.url,
                base=self.model.path,
            )
            if self.config.rounds.max_rounds > 1:
                return Rounds(job, self.config, inputs).run()
            return finetune(job)

        inputs = {
            "masks": self._after("batches", "unsafe_experts"),
            "train": asdict(self.config.train),
            "seed": self.config.seed,
        }
        if self.config.rounds.max_rounds > 1:
            inputs["rounds"] = asdict(self.config.rounds)
        return self._stage("experts", inputs, work)

    def evaluate(self, when: str) -> Folder:
        """Held-out answers, verdicts and losses: `before` or `after` the repair."""
        from moe_ray.evaluation import summarise
        from moe_ray.orchestration.answer import answer

        def work(folder: Folder) -> dict[str, Any]:
            adapter = self.folder.sub("experts").url if when == "after" else None
            test = self.prepare_frame("test.parquet")
            answers = answer(test, self.model, self.config.evaluate, what=f"evaluation {when}", adapter=adapter)
            folder.write_table("answers.parquet", answers)
            return {"metrics": summarise(answers)}

        inputs = {
            "inputs": self._after("batches", "experts") if when == "after" else self._after("batches"),
            "evaluate": asdict(self.config.evaluate),
        }
        return self._stage(f"evaluation_{when}", inputs, work)

    def compare(self) -> pd.DataFrame:
        """Per-batch masks held against the baselines, trained and measured alike on the held-out examples."""
        from moe_ray.orchestration.compare import ComparisonJob, run_arms

        started = time.perf_counter()
        folder = self.folder.sub("baselines")
        risk = self.folder.sub("unsafe_experts").read_frame("risk_differences.parquet")
        job = ComparisonJob(
            model=self.model,
            evaluate=self.config.evaluate,
            seed=self.config.seed,
            batches_url=self.folder.sub("batches").url,
            trained_batches=self.masks.trained_batches,
            num_actors=self.config.baselines.max_concurrent,
            gpus_per_actor=self.config.train.gpus_per_worker,
        )
        inputs = {
            "batches": self._after("batches"),
            "evaluate": asdict(self.config.evaluate),
            "trained_batches": list(self.masks.trained_batches),
            "seed": self.config.seed,
        }
        arms = plan_arms(self.masks, risk, self.config.train, self.config.baselines)
        table = comparison_table(run_arms(job, arms, folder, inputs))
        folder.write_table("comparison.parquet", table)
        folder.write_json("verdict.json", verdict(table))
        self.seconds["baselines"] = round(time.perf_counter() - started, 2)
        return table

    def prepare_frame(self, name: str) -> pd.DataFrame:
        """A table of the `batches` stage."""
        return self.folder.sub("batches").read_frame(name)

    @cached_property
    def masks(self) -> ExpertMasks:
        """The masks of the `unsafe_experts` stage."""
        return read_masks(self.folder.sub("unsafe_experts"))

    def summary(self) -> dict[str, Any]:
        """What `summary.json` holds, but for the tracking run and the total time."""
        tuned = self.folder.sub("experts").notes()
        risk = self.folder.sub("unsafe_experts").read_frame("risk_differences.parquet")
        metrics = {when: self.folder.sub(f"evaluation_{when}").notes()["metrics"] for when in ("before", "after")}
        return report.build_summary(
            masks=self.masks,
            batches=self.prepare_frame("batches.parquet"),
            num_experts_per_tok=self.counts.num_experts_per_tok,
            tuned=tuned,
            before=metrics["before"],
            after=metrics["after"],
            certainty=certainty_per_batch(risk, self.masks, self.config.selection),
        )

    @cached_property
    def counts(self) -> RoutingCounts:
        """The counts of the `routing` stage."""
        from moe_ray.orchestration.capture import read_counts

        return read_counts(self.folder.sub("routing").sub("counts"))


def winning_config(config: Config, settings: Mapping[str, Any]) -> Config:
    """The configuration of a run with a trial's settings, without the sweep."""
    return with_settings(config, {**settings, "sweep.run": False})


def settings_as_text(config: Config) -> dict[str, str]:
    """Dotted settings as text, for tracking."""
    return {key: str(value) for key, value in flatten(config).items()}

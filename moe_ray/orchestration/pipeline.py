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
from moe_ray.artifacts import STARTED, Folder, content_hash, hash_checkpoint, hash_file, read_masks, write_masks
from moe_ray.batches import batches_to_frame, example_to_row, examples_to_frame
from moe_ray.config import EMBEDDED, Config, ModelConfig
from moe_ray.config_io import flatten, to_yaml
from moe_ray.count_parts import BATCHES, ROWS_PER_GROUP, parts_info, read_lengths
from moe_ray.export import export_name, export_pickle
from moe_ray.identification import certainty_per_batch
from moe_ray.loading import num_decoder_layers
from moe_ray.orchestration.inputs import Prompts
from moe_ray.quarantine import QUARANTINE, without_quarantined
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
        folder.write_bytes("config.yaml", to_yaml(config).encode())

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
        if changed is None:
            changed = folder.changed_inputs(inputs, marker=STARTED)
        if changed == []:
            logger.info("%s: resuming an unfinished stage", name)
        else:
            if changed:
                logger.info("%s: run again, because these inputs changed: %s", name, ", ".join(changed))
            folder.start(inputs)
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
            "with_validation": self.config.train.patience > 0,
            "seed": self.config.seed,
            **self.checkpoint,
        }
        return self._stage("batches", inputs, self._prepare)

    def _prepare(self, folder: Folder) -> dict[str, Any]:
        train = self._with_targets(batches_to_frame(self.prompts.assembly.batches), "own answers, training")
        test = self._with_targets(examples_to_frame(self.prompts.test), "own answers, held out")
        if self.config.train.patience:
            validation = examples_to_frame(self.prompts.validation)
            folder.write_table("validation.parquet", self._with_targets(validation, "own answers, validation"))
        folder.write_table(BATCHES, train, row_group_size=ROWS_PER_GROUP)
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
            batches = self.folder.sub("batches")
            return capture(batches, folder, self.model, self.config.capture, seed=self.config.seed)

        return self._stage("routing", self._capture_inputs(), work)

    def _capture_inputs(self) -> dict[str, Any]:
        """What the counts depend on; not how many processes count them, nor how many tokens at once."""
        settings = self.config.capture
        inputs: dict[str, Any] = {
            "batches": self._after("batches"),
            **self.checkpoint,
            "model.dtype": self.model.dtype,
            "model.experts_implementation": self.model.experts_implementation,
        }
        names = ["weights", "ids", "template_tokens", "max_tokens", "too_long", "generate"]
        if settings.generate:
            names += ["max_new_tokens", "temperature"]
            inputs["seed"] = self.config.seed
        return inputs | {f"capture.{name}": getattr(settings, name) for name in names}

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
            without = sorted(set(self.prepare_frame(BATCHES)["batch_idx"]) - set(masks.batch_idx))
            return {
                "union_experts": len(masks.union_experts),
                "masks": masks.digest(),
                "batches_without_mask": [int(batch) for batch in without],
            }

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
            batches=self.captured_examples,
            model_name=self.model.path,
            num_experts_per_tok=self.num_experts_per_tok,
            num_layers=num_decoder_layers(self.model),
            threshold=self.config.selection.threshold,
            top_k=self.config.selection.top_k,
        )
        folder.write_bytes(export_name(self.model.path), data.getvalue())

    def finetune(self) -> Folder:
        """The learned experts."""
        from moe_ray.orchestration.finetune import FineTuneJob, finetune

        def work(folder: Folder) -> dict[str, Any]:
            job = FineTuneJob(
                model=self.model,
                config=self.config.train,
                seed=self.config.seed,
                batches_url=self.folder.sub("batches").url,
                masks_url=self.folder.sub("unsafe_experts").url,
                out_url=folder.url,
                base=self.model.path,
                routing_url=self.folder.sub("routing").url,
            )
            return finetune(job)

        inputs = {
            "masks": self._after("batches", "unsafe_experts"),
            "train": asdict(self.config.train),
            "seed": self.config.seed,
        }
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
            batches=self.captured_examples,
            num_experts_per_tok=self.num_experts_per_tok,
            tuned=tuned,
            before=metrics["before"],
            after=metrics["after"],
            certainty=certainty_per_batch(risk, self.masks, self.config.selection),
        ) | {"quarantined_examples": self.folder.sub("routing").notes()["quarantined"]}

    @cached_property
    def checkpoint(self) -> dict[str, str]:
        """Hashes of what the model is made of."""
        return hash_checkpoint(self.model.path, self.model.revision)

    @property
    def captured_examples(self) -> pd.DataFrame:
        """The examples of the batches, without those in quarantine."""
        quarantined = self.folder.sub("routing").read_frame(QUARANTINE)
        return without_quarantined(self.prepare_frame(BATCHES), quarantined)

    @property
    def num_experts_per_tok(self) -> int:
        """The router's k."""
        return parts_info(self.folder.sub("routing").sub("counts")).num_experts_per_tok

    def lengths(self) -> RoutingCounts:
        """Counted tokens of each example of the batches that have masks; see `read_lengths`."""
        return read_lengths(self.folder.sub("routing").sub("counts"), self.masks.batch_idx)


def settings_as_text(config: Config) -> dict[str, str]:
    """Dotted settings as text, for tracking."""
    return {key: str(value) for key, value in flatten(config).items()}

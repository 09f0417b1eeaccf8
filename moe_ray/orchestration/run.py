"""The stages of a run, in order, each reading what the one before wrote.

A stage is reused when its manifest names equal inputs; the inputs of a stage hold a hash of those of the stages before it,
so a change anywhere runs everything after it again, and nothing before it.
"""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.config.fields import EMBEDDED
from moe_ray.config.model import ModelConfig
from moe_ray.config.run import Config
from moe_ray.errors import InputError
from moe_ray.evaluation.evaluate import INPUT_COLUMNS, assign_reference_batches
from moe_ray.evaluation.judges import judge_identity
from moe_ray.evaluation.metrics import paired_changes, summarise
from moe_ray.experts import ExpertMasks
from moe_ray.identification.identify import certainty_per_batch
from moe_ray.identification.mask_files import read_masks, write_masks
from moe_ray.identification.pandas_export import export_name, export_pickle
from moe_ray.identification.selection import select
from moe_ray.models.loading import context_length, load_tokenizer, num_decoder_layers
from moe_ray.prompts.example_tables import BATCHES, ROWS_PER_GROUP, batches_to_frame, example_to_row, examples_to_frame
from moe_ray.prompts.pair_filter import pair_counts, pair_outcomes, unanswered_pairs
from moe_ray.prompts.prompt_set import Prompts, without_pairs
from moe_ray.prompts.quarantine import QUARANTINE, Rejected, without_quarantined
from moe_ray.report.run_text import describe_pair_counts
from moe_ray.report.study_text import verdict
from moe_ray.report.summary import build_summary
from moe_ray.routing.count_store import parts_info, read_lengths
from moe_ray.routing.counts import RoutingCounts
from moe_ray.routing.encode_example import unanswerable
from moe_ray.storage.fingerprint import content_hash, hash_checkpoint, hash_file
from moe_ray.storage.folder import STARTED, Folder
from moe_ray.studies.baselines import plan_arms
from moe_ray.studies.comparison import comparison_table
from moe_ray.studies.search_space import winning_config

if TYPE_CHECKING:
    from moe_ray.orchestration.jobs.answer import Answers
    from moe_ray.orchestration.tracking.mlflow_run import Tracker

logger = logging.getLogger(__name__)

HeldOut = Literal["test", "validation"]

_LEFT_OUT = ("split", "id", "label", "category", "reason", "detail")


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
        self.tracker: Tracker | None = None
        self._inputs: dict[str, dict[str, Any]] = {}

    def with_config(self, config: Config) -> Run:
        """The same run, its folder and what it has done so far, with other settings of what comes next."""
        other = Run(config, self.model, self.prompts, self.folder)
        other.seconds, other.reused, other._inputs = self.seconds, self.reused, dict(self._inputs)
        other.tracker = self.tracker
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
        if changed is None:
            changed = folder.changed_inputs(inputs, marker=STARTED)
        if changed == []:
            logger.info("%s: resuming an unfinished stage", name)
        else:
            if changed:
                logger.info("%s: run again, because these inputs changed: %s", name, ", ".join(changed))
            folder.start(inputs)
        started = time.perf_counter()
        with self._tracked(name, folder):
            notes = work(folder)
        self.seconds[name] = round(time.perf_counter() - started, 2)
        folder.finish(inputs, seconds=self.seconds[name], **notes)
        logger.info("%s: done in %.1f s", name, self.seconds[name])
        return folder

    def _tracked(self, name: str, folder: Folder) -> AbstractContextManager[object]:
        if self.tracker is None:
            return nullcontext()
        from moe_ray.orchestration.tracking.run_log import stage_run

        return stage_run(self.tracker, name, folder)

    def _after(self, *stages: str) -> str:
        return content_hash([self._inputs[stage] for stage in stages])

    def filter_pairs(self) -> Folder:
        """Which pairs are kept, as `pairs.parquet`; the run's prompts are grouped anew from those."""
        pairs = [example for example in self.prompts.examples if example.pair is not None]
        inputs = {
            "pairs": content_hash([example_to_row(example) for example in pairs]),
            "keep_pairs": self.config.prompts.keep_pairs,
            "max_new_tokens": self.config.evaluate.max_new_tokens,
            "judge": judge_identity(self.config.evaluate),
            **self.checkpoint,
        }

        def work(folder: Folder) -> dict[str, Any]:
            frame = examples_to_frame(pairs).assign(batch_idx=-1, target=None)
            bad = frame["pair"].isin(frame.loc[list(self._unanswerable(frame)), "pair"])
            answers = self._answer(frame[~bad], folder.sub("answers"), "answers, pairs").answers
            judged = self._judge(answers, folder.sub("verdicts"), "verdicts, pairs")
            outcomes = pd.concat([pair_outcomes(judged), unanswered_pairs(frame[bad])], ignore_index=True)
            folder.write_table("pairs.parquet", outcomes)
            return pair_counts(outcomes)

        folder = self._stage("pairs", inputs, work)
        outcomes = folder.read_frame("pairs.parquet")
        logger.info("pairs: %s", describe_pair_counts(folder.notes()))
        self.prompts = without_pairs(self.prompts, set(outcomes.loc[~outcomes["kept"], "pair"]), self.config)
        return folder

    def prepare(self) -> Folder:
        """Batches and held-out examples, with a target for each."""
        settings = self.config.prompts
        if settings.keep_pairs != "all":
            self.filter_pairs()
        files = {name: hash_file(name) for name in settings.files if name != EMBEDDED}
        rows = [example_to_row(e) for batch in self.prompts.assembly.batches for e in batch.examples]
        rows += [example_to_row(example) for example in self.prompts.validation + self.prompts.test]
        inputs = {
            "files": files,
            "examples": content_hash(rows),
            "prompts": asdict(settings),
            "seed": self.config.seed,
            "held_out_columns": list(INPUT_COLUMNS),
            **self.checkpoint,
        }
        return self._stage("batches", inputs, self._prepare)

    def _prepare(self, folder: Folder) -> dict[str, Any]:
        own_answers = folder.sub("own_answers")
        train = batches_to_frame(self.prompts.assembly.batches)
        held_out = {"test": self.prompts.test}
        if self.prompts.validation:
            held_out["validation"] = self.prompts.validation
        left_out: list[dict[str, Any]] = []
        for split, examples in held_out.items():
            frame = self._without_unanswerable(examples_to_frame(examples), split, left_out)
            frame["batch_idx"] = assign_reference_batches(frame, train)
            frame = self._with_targets(frame, own_answers.sub(split), f"own answers, {split}")
            folder.write_table(f"{split}.parquet", frame)
        train = self._with_targets(train, own_answers.sub("train"), "own answers, training")
        folder.write_table(BATCHES, train, row_group_size=ROWS_PER_GROUP)
        folder.write_table("left_out.parquet", pd.DataFrame(left_out, columns=[*_LEFT_OUT]))
        left_over = len(self.prompts.assembly.left_over)
        num_test = len(self.prompts.test) - sum(row["split"] == "test" for row in left_out)
        return {"examples": len(train), "test_examples": num_test, "left_over": left_over, "left_out": len(left_out)}

    def _unanswerable(self, frame: pd.DataFrame) -> dict[Any, Rejected]:
        """The rows that the model cannot be asked, each with the reason."""
        policy = self.config.capture.too_long
        return unanswerable(frame, load_tokenizer(self.model), limit=context_length(self.model), too_long=policy)

    def _without_unanswerable(self, frame: pd.DataFrame, split: str, left_out: list[dict[str, Any]]) -> pd.DataFrame:
        """The held-out examples that can be answered; the others are listed.

        Raises:
            InputError: more than `capture.max_bad_share` of them cannot.
        """
        bad, share = self._unanswerable(frame), self.config.capture.max_bad_share
        for place, why in bad.items():
            row = {name: frame.loc[place, name] for name in ("id", "label", "category")}
            left_out.append({"split": split, **row, "reason": why.reason, "detail": why.detail})
        if len(bad) > share * len(frame):
            first = left_out[-len(bad)]
            raise InputError(
                f"{len(bad)} of {len(frame)} {split} examples cannot be answered, expected at most a share of {share:g}; "
                f"the first is {first['id']!r} ({first['reason']}: {first['detail']}); mend or remove them, or raise "
                "capture.max_bad_share"
            )
        if bad:
            names = ", ".join(repr(row["id"]) for row in left_out[-len(bad) :][:5])
            logger.warning(
                "%d of %d %s examples cannot be answered and are left out: %s", len(bad), len(frame), split, names
            )
        return frame.drop(index=list(bad))

    def _with_targets(self, frame: pd.DataFrame, parts: Folder, what: str) -> pd.DataFrame:
        """Fills missing targets: the refusal for unsafe examples, the model's own answer for safe ones it can be asked."""
        settings = self.config.prompts
        frame = frame.assign(target=frame["target"].astype(object))
        missing = frame["target"].isna()
        frame.loc[missing & (frame["label"] == "unsafe"), "target"] = settings.refusal
        own = frame[missing & (frame["label"] == "safe")]
        # One that cannot be asked stays without a target; the capture sets it aside, or counts the part that fits.
        own = own.drop(index=list(self._unanswerable(own)))
        if len(own):
            config = replace(self.config.evaluate, max_new_tokens=settings.own_answer_tokens)
            answers = self._answer(own, parts, what, config=config).answers
            frame.loc[own.index, "target"] = answers["answer"].to_numpy()
            frame.loc[own.index, "target_complete"] = answers["ended"].to_numpy()
        return frame

    def _answer(
        self,
        frame: pd.DataFrame,
        parts: Folder,
        what: str,
        *,
        config: EvaluateConfig | None = None,
        adapter: str | None = None,
    ) -> Answers:
        """The answers of the base model, or of it with learned experts, under natural routing, in the frame's order."""
        from moe_ray.orchestration.jobs.answer import Job, answer

        job = Job(model=self.model, config=config or self.config.evaluate, parts_url=parts.url, adapter=adapter)
        return answer(frame, job, what=what)

    def _judge(self, answers: pd.DataFrame, parts: Folder, what: str) -> pd.DataFrame:
        from moe_ray.orchestration.jobs.judge import judge

        return judge(answers, self.config.evaluate, parts, what=what)

    def capture(self) -> Folder:
        """Routing counts of every example."""
        from moe_ray.orchestration.jobs.capture import capture

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
            **self._numerics(settings.gpus_per_actor),
        }
        names = ["weights", "ids", "template_tokens", "max_tokens", "too_long", "generate"]
        if settings.generate:
            names += ["max_new_tokens", "temperature"]
            inputs["seed"] = self.config.seed
        return inputs | {f"capture.{name}": getattr(settings, name) for name in names}

    def _numerics(self, gpus_per_actor: float) -> dict[str, str]:
        """In what type and by which kernels the experts are computed; on CPU `auto` has one meaning, see `load_model`."""
        on_cpu = {"dtype": "float32", "experts_implementation": "eager"}
        chosen = {name: getattr(self.model, name) for name in on_cpu}
        if not gpus_per_actor:
            chosen = {name: on_cpu[name] if value == "auto" else value for name, value in chosen.items()}
        return {f"model.{name}": value for name, value in chosen.items()}

    def identify(self) -> Folder:
        """Risk differences, unsafe experts and masks of every batch."""
        from moe_ray.orchestration.jobs.identify import identify

        def work(folder: Folder) -> dict[str, Any]:
            selection = self.config.identify
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
            "selection": asdict(self.config.identify),
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
            threshold=self.config.identify.threshold,
            top_k=self.config.identify.top_k,
        )
        folder.write_bytes(export_name(self.model.path), data.getvalue())

    def sweep(self) -> Folder:
        """The trials of the sweep, ranked, and the winner's configuration; captures nothing."""
        from moe_ray.orchestration.jobs.sweep import sweep, write_results
        from moe_ray.orchestration.jobs.sweep_trial import SweepJob

        def work(folder: Folder) -> dict[str, Any]:
            job = SweepJob(
                model=self.model,
                config=self.config,
                batches_url=self.folder.sub("batches").url,
                routing_url=self.folder.sub("routing").url,
                folder_url=folder.url,
                neutral_texts=self.prompts.neutral,
            )
            return write_results(folder, self.config, sweep(job))

        settings = self.config.sweep
        search = {key: value for key, value in asdict(settings).items() if not key.endswith("_per_trial")}
        inputs = {
            "routing": self._after("batches", "routing"),
            "sweep": {key: value for key, value in search.items() if key not in ("run", "max_concurrent_trials")},
            "selection": asdict(self.config.identify),
            "train": asdict(self.config.finetune),
            **self._measure(),
            "seed": self.config.seed,
        }
        return self._stage("sweep", inputs, work)

    def _measure(self) -> dict[str, Any]:
        """What the measurements of trials, rounds and baselines depend on, beside the prompts."""
        return {
            "judge": judge_identity(self.config.evaluate),
            "max_new_tokens": self.config.evaluate.max_new_tokens,
            "neutral": content_hash(self.prompts.neutral),
        }

    def winner(self) -> Run:
        """This run with the settings of the sweep's winner."""
        notes = self.folder.sub("sweep").notes()
        return self.with_config(winning_config(self.config, notes["winner"]))

    def finetune(self) -> Folder:
        """The learned experts."""
        from moe_ray.orchestration.jobs.finetune import FineTuneJob, finetune
        from moe_ray.orchestration.stages.rounds import Rounds

        def work(folder: Folder) -> dict[str, Any]:
            job = FineTuneJob(
                model=self.model,
                config=self.config.finetune,
                seed=self.config.seed,
                batches_url=self.folder.sub("batches").url,
                masks_url=self.folder.sub("unsafe_experts").url,
                out_url=folder.url,
                base=self.model.path,
                routing_url=self.folder.sub("routing").url,
            )
            if self.config.rounds.max_rounds > 1:
                return Rounds(job, self.config, inputs, self._validation_answers).run()
            return finetune(job)

        inputs = {
            "masks": self._after("batches", "unsafe_experts"),
            "train": asdict(self.config.finetune),
            "seed": self.config.seed,
        }
        if self.config.rounds.max_rounds > 1:
            inputs |= {
                "rounds": asdict(self.config.rounds),
                "selection": asdict(self.config.identify),
                **self._measure(),
            }
        return self._stage("experts", inputs, work)

    def _validation_answers(self, experts: Folder) -> pd.DataFrame:
        """Judged answers to the validation examples by the model with the learned experts of a folder."""
        parts, verdicts = (experts.sub(f"validation_{name}") for name in ("answers", "verdicts"))
        frame = self.prepare_frame("validation.parquet")
        answers = self._answer(frame, parts, "answers, validation", adapter=experts.url).answers
        return self._judge(answers, verdicts, "verdicts, validation")

    def answer(self, when: str, split: HeldOut = "test") -> Folder:
        """Held-out answers, losses and routing, and losses on neutral text: `before` or `after` the repair.

        Nothing is judged here, so another judge, or one that failed, costs no answer.
        """
        from moe_ray.orchestration.jobs.answer import Job, answer

        config = self.config.evaluate
        masked = config.routing != "natural"

        def work(folder: Folder) -> dict[str, Any]:
            job = Job(
                model=self.model,
                config=config,
                parts_url=folder.sub("parts").url,
                adapter=self.folder.sub("experts").url if when == "after" else None,
                masks_url=self.masks_of(when).url if masked else None,
                count=True,
                short_layers=self.config.finetune.short_layers,
            )
            examples, what = self.prepare_frame(f"{split}.parquet"), f"answers {when}"
            done = answer(examples, job, what=what, routing=config.routing, neutral=self.prompts.neutral)
            return {"answers": len(done.answers)}

        earlier = ["batches"] + (["unsafe_experts"] if masked else []) + (["experts"] if when == "after" else [])
        inputs = {
            "inputs": self._after(*earlier),
            "routing": config.routing,
            "short_layers": self.config.finetune.short_layers if masked else None,
            "max_new_tokens": config.max_new_tokens,
            "neutral": content_hash(self.prompts.neutral),
            **self._numerics(config.gpus_per_actor),
        }
        return self._stage(_stage_name("answers", when, split), inputs, work)

    def masks_of(self, when: str) -> Folder:
        """The folder of the masks to route through: after rounds those that the kept round trained under."""
        has_rounds = when == "after" and self.config.rounds.max_rounds > 1
        return self.folder.sub("experts" if has_rounds else "unsafe_experts")

    def evaluate(self, when: str, split: HeldOut = "test") -> Folder:
        """Verdicts and figures on held-out examples, `before` or `after` the repair; after it, also what changed.

        Args:
            when: `before` or `after`; what is before comes first.
            split: `test`, or `validation` for choosing settings.
        """
        from moe_ray.orchestration.jobs.answer import read_answers

        before = _stage_name("evaluation", "before", split)
        if when == "after" and before not in self._inputs:
            self.evaluate("before", split)
        source = self.answer(when, split).sub("parts")

        def work(folder: Folder) -> dict[str, Any]:
            done = read_answers(source)
            judged = self._judge(done.answers, folder.sub("verdicts"), f"verdicts {when}").drop(columns="place")
            folder.write_table("answers.parquet", judged)
            if when == "before":
                return {"metrics": summarise(judged, neutral=done.neutral, routing=done.routing)}
            first = read_answers(self.folder.sub(_stage_name("answers", "before", split)).sub("parts"))
            metrics = summarise(judged, neutral=done.neutral, routing=done.routing, routing_before=first.routing)
            judged_before = self.folder.sub(before).read_frame("answers.parquet")
            change = paired_changes(judged_before, judged, neutral_before=first.neutral, neutral_after=done.neutral)
            return {"metrics": metrics, "change": change}

        inputs = {
            "answers": self._after(_stage_name("answers", when, split)),
            "before": self._after(before) if when == "after" else None,
            "judge": judge_identity(self.config.evaluate),
        }
        return self._stage(_stage_name("evaluation", when, split), inputs, work)

    def compare(self) -> pd.DataFrame:
        """Per-batch masks held against the baselines, trained and measured alike on the held-out examples."""
        from moe_ray.orchestration.jobs.compare import ComparisonJob, run_arms

        started = time.perf_counter()
        folder = self.folder.sub("baselines")
        risk = self.folder.sub("unsafe_experts").read_frame("risk_differences.parquet")
        job = ComparisonJob(
            model=self.model,
            evaluate=self.config.evaluate,
            seed=self.config.seed,
            batches_url=self.folder.sub("batches").url,
            routing_url=self.folder.sub("routing").url,
            trained_batches=self.masks.trained_batches,
            num_actors=self.config.compare.max_concurrent,
            gpus_per_actor=self.config.finetune.gpus_per_worker,
            neutral_texts=self.prompts.neutral,
        )
        inputs = {
            "batches": self._after("batches", "routing"),
            **self._measure(),
            "trained_batches": list(self.masks.trained_batches),
            "seed": self.config.seed,
        }
        arms = plan_arms(self.masks, risk, self.config.finetune, self.config.compare)
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
        evaluated = {when: self.folder.sub(f"evaluation_{when}").notes() for when in ("before", "after")}
        pairs = self.folder.sub("pairs").notes() if "pairs" in self._inputs else None
        return build_summary(
            masks=self.masks,
            batches=self.captured_examples,
            num_experts_per_tok=self.num_experts_per_tok,
            tuned=tuned,
            before=evaluated["before"]["metrics"],
            after=evaluated["after"]["metrics"],
            change=evaluated["after"]["change"],
            pairs=pairs,
            certainty=certainty_per_batch(risk, self.masks, self.config.identify),
        ) | {
            "quarantined_examples": self.folder.sub("routing").notes()["quarantined"],
            "held_out_left_out": self.folder.sub("batches").notes()["left_out"],
        }

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


def _stage_name(kind: str, when: str, split: HeldOut) -> str:
    return f"{kind}_{when}" if split == "test" else f"{kind}_{when}_{split}"

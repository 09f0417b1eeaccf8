"""What the stages of a run share: settings, model, prompts, the run directory, and what the stages before them made."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any

from moe_ray.config.auto import Auto, gpus_of
from moe_ray.config.capture import Engine
from moe_ray.config.effects import settings_affecting
from moe_ray.config.fields import Effect
from moe_ray.config.model import ModelConfig
from moe_ray.config.run import Config
from moe_ray.evaluation.judges import judge_identity
from moe_ray.orchestration.cluster.model_pool import ModelPool
from moe_ray.orchestration.stages.seconds import START, Seconds
from moe_ray.prompts.prompt_set import Prompts
from moe_ray.resources.training import Room
from moe_ray.run_directory import RunDirectory
from moe_ray.storage.fingerprint import content_hash, hash_checkpoint
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage import Around, Outcome, Stage, run_stage


class Context:
    """One run, as its stages see it.

    Args:
        config: the resolved configuration.
        model: the model that is used: `config.model`, or what was built for it where that is `embedded`.
        prompts: from `read_prompts`.
        directory: of the run.

    Attributes:
        outcomes: by name, of the stages that were done or reused so far.
        around: entered while the work of a stage is done.
        models: the model processes, which stay from stage to stage.
        room: the machines, as far as they were looked at; None = what is trained is taken to have room.
        asked: the settings as they were given, where `config` has numbers in the place of `auto`.
        seconds: where the time goes.
    """

    def __init__(self, config: Config, model: ModelConfig, prompts: Prompts, directory: RunDirectory) -> None:
        self.config, self.model, self.prompts, self.directory = config, model, prompts, directory
        self.outcomes: dict[str, Outcome] = {}
        self.around: Around = lambda name, folder: nullcontext()
        self.models = ModelPool(model)
        self.asked = config
        self.room: Room | None = None
        self.seconds = Seconds()

    def do(self, stage: Stage) -> Outcome:
        """The stage's outcome, made now or before."""
        waited = self.models.seconds_waited

        def work(folder: Folder) -> dict[str, Any]:
            notes = stage.work(folder)
            return {**notes, START: round(self.models.seconds_waited - waited, 2)}

        with self.seconds.stage(stage.name) as done:
            done.append(run_stage(replace(stage, work=work), self.directory.folder, around=self.around))
        self.outcomes[stage.name] = done[0]
        return done[0]

    def made(self, stage: str, what: str) -> str:
        """The digest of something that an earlier stage made."""
        return self.outcomes[stage].made(what)

    def settings(self, *effects: Effect) -> dict[str, Any]:
        """The settings with one of these effects, by dotted key, without those of the model and the seed.

        A stage has the model among its inputs by its content (`checkpoint`) and its number types (`numerics`), not by its
        path. It adds the seed itself if it draws random numbers.
        """
        found = settings_affecting(self.config, *effects)
        chosen = {key: value for key, value in found.items() if not key.startswith("model.") and key != "seed"}
        for section in (self.config.capture, self.config.evaluate):
            if section.engine == "transformers":
                # As every run before there was another one, whose results stay good.
                chosen.pop(section.key("engine"), None)
        return chosen

    @cached_property
    def checkpoint(self) -> dict[str, str]:
        """Hashes of what the model is made of."""
        options = self.model.chat_template_options
        found = hash_checkpoint(self.model.path, self.model.revision)
        return {**found, "model.chat_template_options": content_hash(dict(options))} if options else found

    def numerics(self, gpus_per_actor: float | Auto, *, engine: Engine = "transformers") -> dict[str, str]:
        """The type of numbers and the kernels that experts are computed with.

        The type is the run's, which is decided once. On CPU `auto` always stands for the same kernels (see `load_model`),
        so there it equals their names.

        Args:
            gpus_per_actor: 0 = CPU. What training depends on is always asked for with 0, so that training on GPUs instead is
                no reason to train again.
            engine: that runs the model.
        """
        on_cpu = {"dtype": "float32", "experts_implementation": "eager"}
        chosen = {name: getattr(self.model, name) for name in on_cpu}
        if not gpus_of(gpus_per_actor):
            chosen = {name: on_cpu[name] if value == "auto" else value for name, value in chosen.items()}
        if engine != "transformers":
            chosen |= {"engine": engine, "vllm_options": content_hash(dict(self.model.vllm_options))}
        return {f"model.{name}": value for name, value in chosen.items()}

    def judged_answers(self, gpus_per_actor: float | Auto, *, engine: Engine = "transformers") -> dict[str, Any]:
        """What judged answers under natural routing depend on, beside the prompts and the learned experts.

        Args:
            gpus_per_actor: 0 = CPU.
            engine: that generates them.
        """
        settings = self.settings("answers")
        for name in ("evaluate.routing", "finetune.short_layers", "evaluate.neutral_file", "evaluate.engine"):
            settings.pop(name, None)  # Of other routing, and of texts that are not answers.
        return {
            **self.checkpoint,
            **self.numerics(gpus_per_actor, engine=engine),
            **settings,
            "judge": judge_identity(self.config.evaluate),
        }

    def measurement(self) -> dict[str, Any]:
        """What the measurements of trials and arms depend on, beside the prompts: answers, and losses on neutral text."""
        return {**self.judged_answers(0), "neutral": content_hash(self.prompts.neutral)}

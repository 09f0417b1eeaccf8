"""From a configuration to a workflow at work: everything that can be refused is refused before Ray starts."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from moe_ray.config.auto import gpus_of, processes_of
from moe_ray.config.fields import EMBEDDED
from moe_ray.config.model import ModelConfig
from moe_ray.config.run import Config
from moe_ray.config.shards import check_shards
from moe_ray.errors import OutsideFailed
from moe_ray.evaluation.target_check import refuse_complying_targets, refuse_targets_without_answer
from moe_ray.orchestration.cluster.local_environment import set_local_environment
from moe_ray.orchestration.inputs import (
    WITHOUT_TRAINING,
    cache_folder,
    check_requests,
    check_threshold,
    model_size,
    resolve_model,
    uses_masks,
    warn_of_embedded_prompts,
)
from moe_ray.orchestration.stages.seconds import Seconds
from moe_ray.organisms.build_process import EmbeddedBuild
from moe_ray.prompts.prompt_set import Prompts, read_prompts
from moe_ray.resources.decide import Decision, decide, local_cpus
from moe_ray.resources.model_size import ModelSize
from moe_ray.resources.record import decided_dtype, write_decision
from moe_ray.resources.training import Room
from moe_ray.run_directory import CAPTURE, RunDirectory
from moe_ray.storage.folder import Folder
from moe_ray.storage.lock import locked
from moe_ray.storage.stage import is_finished

if TYPE_CHECKING:
    from moe_ray.orchestration.cluster.model_pool import ModelPool

logger = logging.getLogger(__name__)

_WITH_MODEL = ("capture", "identify", "ablate", "finetune", "evaluate", "full", "sweep", "compare")
"""Workflows whose first long stage is the capture."""


def launch(config: Config, workflow: str, *, began: float | None = None) -> None:
    """Does a workflow, with Ray connected meanwhile.

    What takes long to start does so at the same time: the embedded model is built in a process of its own and this process
    imports the model library, while Ray starts; the model process starts while the tracking does.

    Args:
        config: the resolved configuration, with an absolute run directory.
        workflow: a key of `WORKFLOWS`.
        began: the moment on `time.perf_counter` that the user's wait began; None = now.

    Raises:
        MoeRayError: the configuration, the prompts or the model cannot be used, another process is at work in the run
            directory, or a stage ended with an error.
    """
    seconds = Seconds(began)
    prompts = read_prompts(config)
    refuse_targets_without_answer(prompts.examples)
    if not config.prompts.allow_complying_targets:
        refuse_complying_targets(prompts.examples)
    check_requests(config)
    check_shards(config, trains=workflow not in WITHOUT_TRAINING)
    if config.model.path != EMBEDDED:
        config.model.local_folder()
        _import_model_library()
    model = resolve_model(config, trained=workflow not in WITHOUT_TRAINING, masked=uses_masks(config, workflow))
    check_threshold(config, workflow)
    size = model_size(config)
    warn_of_embedded_prompts(config)
    directory = RunDirectory.open(config.run_dir)
    logger.info("run directory %s", directory.folder.url)
    with locked(directory.folder):
        directory.write_config(config)
        _launch(config, workflow, prompts, model, size, directory, seconds)


def _launch(
    asked: Config,
    workflow: str,
    prompts: Prompts,
    model: ModelConfig,
    size: ModelSize,
    directory: RunDirectory,
    seconds: Seconds,
) -> None:
    set_local_environment(asked.cluster)
    # Ray and MLflow take seconds to import, and are not needed to refuse anything above. Ray reads the environment then.
    from moe_ray.orchestration.cluster.cluster_nodes import cluster_nodes
    from moe_ray.orchestration.cluster.model_pool import ModelPool
    from moe_ray.orchestration.cluster.placement import Placement
    from moe_ray.orchestration.cluster.ray_session import check_reachable, is_local, ray_session

    at_end: list[Callable[[], None]] = []
    with ExitStack() as stack:
        build = stack.enter_context(_build(asked))
        # The imports have no module in common with what starts Ray, so neither thread finds one half imported.
        library = stack.enter_context(ThreadPoolExecutor(1)).submit(_import_model_library)
        seconds.add("start", time.perf_counter() - seconds.began, is_start=True)
        with seconds.spent_on("ray", is_start=True):
            cluster = replace(asked.cluster, num_cpus=local_cpus(asked))
            stack.enter_context(ray_session(cluster, dashboard=asked.finetune.needs_ray_train))
            stack.enter_context(_storage_failures_named(directory.folder))
            check_reachable(directory.folder)
            before = decided_dtype(directory.folder, asked.model)
            placement = Placement.of(asked.cluster)
            nodes = cluster_nodes(placement.fits, placement.has_gpus)
            room = Room(model=size, nodes=nodes, may_grow=not is_local())
            decision = decide(asked, size, room.nodes, dtype=before, may_grow=room.may_grow)
        if workflow in _WITH_MODEL:
            _say(decision)
        config, model = decision.config, replace(model, dtype=decision.config.model.dtype)
        # What was given and what `auto` is for the model's numbers; how many processes work is each machine's own business.
        directory.write_config(replace(asked, model=config.model))
        write_decision(directory.folder, config.model, decision.in_words)
        models = stack.enter_context(ModelPool(model, memory=decision.process_bytes, placement=placement))
        if workflow in _WITH_MODEL and not is_finished(directory.sub(CAPTURE)):
            _start_ahead(models, config)
        with seconds.spent_on("imports", is_start=True):
            library.result()
            from moe_ray.orchestration.run import Run
            from moe_ray.orchestration.workflows import WORKFLOWS

        def await_model() -> None:
            if build is not None:
                with seconds.spent_on("model"):
                    build.wait()
                models.load()

        if build is None:
            models.load()
        run = Run(config, model, prompts, directory)
        run.seconds, run.models, run.at_end, run.await_model = seconds, models, at_end, await_model
        run.asked, run.room = replace(asked, model=config.model), room
        WORKFLOWS[workflow](run)
        ended = time.perf_counter()
    seconds.add("shutdown", time.perf_counter() - ended)
    for show in at_end:
        show()


@contextmanager
def _storage_failures_named(folder: Folder) -> Iterator[None]:
    """An error of remote storage is the outside's; one of a local disk may be a fault of ours and keeps its traceback."""
    try:
        yield
    except OSError as error:
        if "file" in folder.fs.protocol:
            raise
        raise OutsideFailed(
            f"storage at {folder.url} failed: {error}; what was done is kept, run the same command again"
        ) from error


def _build(config: Config) -> AbstractContextManager[EmbeddedBuild | None]:
    """The build of the embedded model where it is wanted and not there yet, else nothing."""
    if config.model.path != EMBEDDED:
        return nullcontext()
    build = EmbeddedBuild(cache_folder(config), seed=config.seed)
    return nullcontext() if build.folder.is_dir() else build


def _start_ahead(models: ModelPool, config: Config) -> None:
    """Starts the processes of the stage that is the first to need them."""
    first = config.capture if config.prompts.keep_pairs == "all" else config.evaluate
    models.start(processes_of(first.num_actors), gpus=gpus_of(first.gpus_per_actor))


def _say(decision: Decision) -> None:
    logger.info("%s", decision.in_words)
    for warning in decision.warnings:
        logger.warning("%s", warning)


def _import_model_library() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("httpx", "httpx2"):  # a line with the address for every call of a judge endpoint
        logging.getLogger(name).setLevel(logging.WARNING)
    importlib.import_module("moe_ray.models.loading")

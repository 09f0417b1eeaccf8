"""From a configuration to a workflow at work: everything that can be refused is refused before Ray starts."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from moe_ray.config.fields import EMBEDDED
from moe_ray.config.run import Config
from moe_ray.errors import OutsideFailed
from moe_ray.orchestration.cluster.local_environment import set_local_environment
from moe_ray.orchestration.inputs import check_requests, resolve_model
from moe_ray.prompts.prompt_set import read_prompts
from moe_ray.run_directory import RunDirectory
from moe_ray.storage.folder import Folder

logger = logging.getLogger(__name__)

_WITHOUT_TRAINING = ("prepare", "capture", "identify")


def launch(config: Config, workflow: str) -> None:
    """Does a workflow, with Ray connected meanwhile.

    Args:
        config: the resolved configuration, with an absolute run directory.
        workflow: a key of `WORKFLOWS`.

    Raises:
        MoeRayError: the configuration, the prompts or the model cannot be used, or a stage ended with an error.
    """
    started = time.perf_counter()
    prompts = read_prompts(config)
    check_requests(config)
    if config.model.path != EMBEDDED:
        config.model.local_folder()
    _quieten_libraries()
    model = resolve_model(config, _log_build, trained=workflow not in _WITHOUT_TRAINING)
    directory = RunDirectory.open(config.run_dir)
    logger.info("run directory %s", directory.folder.url)
    directory.write_config(config)
    set_local_environment(config.cluster)
    # Ray and MLflow take seconds to import, and are not needed to refuse anything above. Ray reads the environment then.
    from moe_ray.orchestration.cluster.ray_session import check_reachable, ray_session
    from moe_ray.orchestration.run import Run
    from moe_ray.orchestration.workflows import WORKFLOWS

    run = Run(config, model, prompts, directory)
    run.other_seconds["start"] = round(time.perf_counter() - started, 2)
    before_ray = time.perf_counter()
    with ray_session(config.cluster), _storage_failures_named(directory.folder):
        check_reachable(directory.folder)
        run.other_seconds["ray"] = round(time.perf_counter() - before_ray, 2)
        WORKFLOWS[workflow](run)


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


def _quieten_libraries() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("httpx", "httpx2"):  # a line with the address for every call of a judge endpoint
        logging.getLogger(name).setLevel(logging.WARNING)


def _log_build(done: int, total: int, loss: float) -> None:
    if done in (1, total) or done % max(1, total // 10) == 0:
        logger.info("building the embedded model (once): step %d of %d, loss %.3f", done, total, loss)

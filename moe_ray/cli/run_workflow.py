"""Commands that run stages: configuration → prompts and model checked → Ray → the workflow's work.

Everything that can be refused is, before Ray starts. Libraries are imported step by step, as late as they are needed: a
wrong prompts file is answered without torch, a wrong model without Ray.
"""

from __future__ import annotations

import argparse
import logging
import time

from moe_ray.cli.commands import COMMANDS
from moe_ray.config.fields import EMBEDDED
from moe_ray.config.io import to_yaml

logger = logging.getLogger("moe_ray")

_WITHOUT_TRAINING = ("run_prepare", "run_capture", "run_identify")
"""Work that a model can be used for whose experts cannot be trained."""


def run(arguments: argparse.Namespace) -> None:
    """Prepares a run with `settings` and does the command's work on it with Ray connected.

    Raises:
        InputError: the prompts, the model or the run directory are not what can be worked with.
    """
    started = time.perf_counter()
    config, work = arguments.settings, COMMANDS[arguments.command].work

    from moe_ray.orchestration.inputs import read_prompts, resolve_model

    prompts = read_prompts(config)
    if config.model.path != EMBEDDED:
        config.model.local_folder()
    _quieten_libraries()
    model = resolve_model(config, _log_build, trained=work not in _WITHOUT_TRAINING)

    from moe_ray.orchestration.run import Run
    from moe_ray.storage.folder import Folder

    folder = Folder.open(config.run_dir)
    logger.info("run directory %s", folder.url)
    folder.write_bytes("config.yaml", to_yaml(config).encode())
    prepared = Run(config, model, prompts, folder)
    prepared.seconds["start"] = round(time.perf_counter() - started, 2)

    from moe_ray.orchestration import workflows
    from moe_ray.orchestration.cluster.session import check_reachable, ray_session

    before_ray = time.perf_counter()
    with ray_session(config.cluster):
        check_reachable(folder)
        prepared.seconds["ray"] = round(time.perf_counter() - before_ray, 2)
        getattr(workflows, work)(prepared)


def _quieten_libraries() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("httpx", "httpx2"):  # a line with the address for every call of a judge endpoint
        logging.getLogger(name).setLevel(logging.WARNING)


def _log_build(done: int, total: int, loss: float) -> None:
    if done in (1, total) or done % max(1, total // 10) == 0:
        logger.info("building the embedded model (once): step %d of %d, loss %.3f", done, total, loss)

"""Stage `capture`: routing counts of every example of the batches."""

from __future__ import annotations

from typing import Any

from moe_ray.orchestration.jobs import capture as job
from moe_ray.orchestration.stages.context import Context
from moe_ray.prompts.quarantine import QUARANTINE, TRUNCATED
from moe_ray.routing.count_store import digest_of_parts
from moe_ray.run_directory import CAPTURE, COUNTS, PROMPTS
from moe_ray.storage.fingerprint import content_hash
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage import MADE, Outcome, Stage

_OF_GENERATION = ("capture.max_new_tokens", "capture.temperature")
_KEYS = ["batch_idx", "in_batch_idx"]


def capture(run: Context) -> Outcome:
    """Makes `counts`, and `left_out`: which examples could not be counted, or only in part."""

    def work(folder: Folder) -> dict[str, Any]:
        notes = job.capture(run.directory, run.model, run.config.capture, seed=run.config.seed, models=run.models)
        left_out = [folder.read_frame(name)[_KEYS].to_numpy().tolist() for name in (QUARANTINE, TRUNCATED)]
        made = {"counts": digest_of_parts(run.directory.sub(COUNTS)), "left_out": content_hash(left_out)}
        return {**notes, MADE: made}

    return run.do(Stage(name=CAPTURE, inputs=capture_inputs(run), work=work))


def capture_inputs(run: Context) -> dict[str, Any]:
    """What the counts depend on. How many processes count, and how many tokens at once, is not among it."""
    settings = run.settings("counts")
    if run.config.capture.generate:
        settings["seed"] = run.config.seed
    else:
        settings = {key: value for key, value in settings.items() if key not in _OF_GENERATION}
    return {
        "examples": run.made(PROMPTS, "examples"),
        **run.checkpoint,
        **run.numerics(run.config.capture.gpus_per_actor),
        **settings,
    }

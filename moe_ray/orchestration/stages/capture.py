"""Stage `capture`: routing counts of every example of the batches."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from moe_ray.config.scores import needed_scores, needs_weights
from moe_ray.orchestration.jobs import capture as job
from moe_ray.orchestration.stages.context import Context
from moe_ray.prompts.quarantine import QUARANTINE, TRUNCATED
from moe_ray.routing.count_store import digest_of_parts
from moe_ray.run_directory import CAPTURE, COUNTS, PROMPTS, RESPONSES
from moe_ray.storage.file_digests import changed_files, file_digests
from moe_ray.storage.fingerprint import content_hash
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage import MADE, MANIFEST, STARTED, Outcome, Stage, decide, is_finished, read_manifest

_OF_GENERATION = ("capture.max_new_tokens", "capture.temperature")
_KEYS = ["batch_idx", "in_batch_idx"]
_SCORES, _WEIGHTS = "capture.scores", "capture.weights"
_FILES = "files"
"""Key of the manifest's notes: a digest per part, by which a damaged one is found."""

_WATCHED = tuple(name.rpartition("/")[2] for name in (COUNTS, RESPONSES))

logger = logging.getLogger(__name__)


def capture(run: Context) -> Outcome:
    """Makes `counts`, and `left_out`: which examples could not be counted, or only in part."""

    def work(folder: Folder) -> dict[str, Any]:
        config = replace(run.config.capture, scores=inputs.get(_SCORES, ()), weights=inputs[_WEIGHTS])
        notes = job.capture(run.directory, run.model, config, seed=run.config.seed, models=run.models)
        left_out = [folder.read_frame(name)[_KEYS].to_numpy().tolist() for name in (QUARANTINE, TRUNCATED)]
        made = {"counts": digest_of_parts(run.directory.sub(COUNTS)), "left_out": content_hash(left_out)}
        files = {name: file_digests(part, part.parquet_names()) for name, part in _folders_of_parts(run).items()}
        return {**notes, MADE: made, _FILES: files}

    inputs = _inputs_of_what_is_there(run)
    _set_damaged_parts_aside(run, inputs)
    return run.do(Stage(name=CAPTURE, inputs=inputs, work=work, watches=_WATCHED))


def _folders_of_parts(run: Context) -> dict[str, Folder]:
    """The folders of parts that the capture has written, by name."""
    return {name: run.directory.sub(name) for name in (COUNTS, RESPONSES) if run.directory.folder.exists(name)}


def _set_damaged_parts_aside(run: Context, inputs: dict[str, Any]) -> None:
    """Takes parts that are not as they were written out of a finished capture, which counts their examples again."""
    folder = run.directory.sub(CAPTURE)
    if decide(folder, inputs).action != "reuse":
        return
    known: dict[str, dict[str, str]] = read_manifest(folder)["notes"].get(_FILES) or {}
    changed = {name: changed_files(run.directory.sub(name), digests) for name, digests in known.items()}
    names = sorted(set().union(*changed.values()))
    if not names:
        return
    logger.warning(
        "capture: %d of its parts are lost or not as they were written (such as %s); their examples are captured again",
        *(len(names), names[0]),
    )
    # An example that has counts is done, and a part of responses has the name of the counts that were written with it.
    folder.remove(MANIFEST)
    for name in names:
        for parts in known:
            run.directory.sub(parts).remove(name)
    if not set(changed.get(RESPONSES, ())) <= known[COUNTS].keys():
        # The counts were written anew under other names: which examples these were is not known.
        folder.remove(STARTED)


def _inputs_of_what_is_there(run: Context) -> dict[str, Any]:
    """The inputs, or those of a finished capture that differs in nothing but that it measured more than is needed.

    So a run that goes back to a rule that needs fewer scores, or no weights, counts nothing again.
    """
    folder, needed, weights = run.directory.sub(CAPTURE), needed_scores(run.config), needs_weights(run.config)
    if is_finished(folder):
        stored = read_manifest(folder)["inputs"]
        scores, has_weights = tuple(stored.get(_SCORES, ())), bool(stored.get(_WEIGHTS))
        has_all = set(needed) <= set(scores) and has_weights >= weights
        richer = capture_inputs(run, scores, weights=has_weights)
        if has_all and decide(folder, richer).action == "reuse":
            return richer
    return capture_inputs(run, needed, weights=weights)


def capture_inputs(run: Context, scores: Sequence[str], *, weights: bool) -> dict[str, Any]:
    """What the counts depend on. How many processes count, and how many tokens at once, is not among it.

    Args:
        run: whose settings they are.
        scores: that are measured beside the counts.
        weights: whether routed weights are.
    """
    settings = {**run.settings("counts"), _WEIGHTS: weights}
    del settings[_SCORES]
    if scores:
        settings[_SCORES] = list(scores)
    if "refusal" in scores:
        settings["targets"] = run.made(PROMPTS, "targets")
    if run.config.capture.generate:
        settings["seed"] = run.config.seed
    else:
        settings = {key: value for key, value in settings.items() if key not in _OF_GENERATION}
    return {
        "examples": run.made(PROMPTS, "examples"),
        **run.checkpoint,
        **run.numerics(run.config.capture.gpus_per_actor, engine=run.config.capture.engine),
        **settings,
    }

"""A stage as a value, and the one place that decides whether its work is reused, resumed or begun anew.

A stage is a name, the inputs that its output depends on, and the work that makes the output. The manifest is the last file
written to its folder. A folder whose manifest names equal inputs is reused. A folder without a manifest, whose work was
begun with equal inputs, is left as it is: the work finds in it what is done already. Any other folder is emptied first; one
with files that no stage wrote is refused.

Inputs are of two kinds: settings that affect the output, and digests of what earlier stages *made*. So where an earlier
stage runs again and makes the same as before, no later stage runs again.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

from moe_ray.errors import InputError
from moe_ray.storage.damage import reading
from moe_ray.storage.fingerprint import environment
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage_files import digests_of_data, lost_files, may_be_a_stages

MANIFEST, STARTED = "manifest.json", "inputs.json"
MADE = "made"
"""Key of a manifest's notes: digests of what the stage made, by name; later stages have them among their inputs."""

_EMPTYING: Mapping[str, Any] = {"is being emptied": True}
"""Stands for the inputs, which are never these, while a folder is emptied."""
logger = logging.getLogger(__name__)

Work = Callable[[Folder], Mapping[str, Any]]
"""Does the work of a stage in its folder; returns plain values for the manifest, with `made` among them."""
Around = Callable[[str, Folder], AbstractContextManager[object]]
"""What is open while a stage is worked on, such as a tracked run; gets the stage's name and folder."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Some work with an output that can be reused.

    Attributes:
        name: of the folder it writes, relative to the run directory or the stage it belongs to; may hold slashes.
        inputs: everything the output depends on, as plain values.
        work: makes the output.
        keeps: patterns of folders inside that hold other stages. They stay when this stage is begun anew, since each of
            them has inputs of its own, which decide whether it is reused.
        watches: folders inside whose files the stage itself compares with what it wrote.
    """

    name: str
    inputs: Mapping[str, Any]
    work: Work = field(repr=False)
    keeps: tuple[str, ...] = ()
    watches: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished stage.

    Attributes:
        folder: where its output is.
        notes: plain values that its work returned.
        seconds: how long the work took, in this run or the earlier one that did it.
        is_reused: an earlier run did the work.
    """

    folder: Folder
    notes: Mapping[str, Any]
    seconds: float
    is_reused: bool

    def made(self, name: str) -> str:
        """The digest of something that the stage made."""
        digest: str = self.notes[MADE][name]
        return digest


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What becomes of a stage.

    Attributes:
        action: `reuse`: there is nothing to do; `resume`: the folder holds unfinished work with the same inputs; `begin`:
            the work starts in an empty folder.
        changed: names of the inputs that differ from those that the folder's output was made from.
    """

    action: Literal["reuse", "resume", "begin"]
    changed: tuple[str, ...] = ()


def decide(folder: Folder, inputs: Mapping[str, Any]) -> Decision:
    """Whether a stage with these inputs is reused, resumed or begun anew, from what its folder holds; changes nothing."""
    finished = _changed_inputs(folder, MANIFEST, inputs)
    if finished is not None:
        return Decision(action="begin", changed=finished) if finished else Decision(action="reuse")
    started = _changed_inputs(folder, STARTED, inputs)
    if started is None or started:
        return Decision(action="begin", changed=started or ())
    return Decision(action="resume")


def _changed_inputs(folder: Folder, marker: str, inputs: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Names of inputs that differ from those in the marker file; None where there is no such file."""
    if not folder.exists(marker):
        return None
    stored, wanted = _read_marker(folder, marker)["inputs"], _plain(inputs)
    return tuple(sorted(key for key in stored.keys() | wanted.keys() if stored.get(key) != wanted.get(key)))


def _plain(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs as they come back from a file."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(inputs)))
    return plain


def begin(
    folder: Folder, inputs: Mapping[str, Any], *, keeps: tuple[str, ...] = (), may_go: tuple[str, ...] = ()
) -> Decision:
    """Decides, and where the stage is begun anew empties its folder and marks it with the inputs.

    A finished stage of which a file was lost or is not as it was written is resumed: its work finds what is left. A changed
    file is removed before, so that it is not taken for a whole one.

    Args:
        folder: of the stage.
        inputs: everything the output depends on.
        keeps: as `Stage.keeps`.
        may_go: files that may be taken away after the stage is finished.

    Raises:
        InputError: it would be emptied, and holds what no stage wrote.
    """
    plain, decision = _plain(inputs), decide(folder, inputs)
    if decision.action == "reuse" and (lost := lost_files(folder, read_manifest(folder), (*keeps, *may_go))):
        logger.warning("%s lacks %s as it was written; it is made again", folder.url, ", ".join(lost[:3]))
        for name in lost:
            folder.remove(name)
        folder.remove(MANIFEST)
        decision = decide(folder, inputs)
    if decision.action == "begin":
        _refuse_foreign_files(folder, keeps)
        # A process that is killed while it empties the folder must leave no manifest behind, which would say that the rest
        # of the folder is complete, but a mark that what is there is a stage's.
        folder.write_json(STARTED, {"inputs": _EMPTYING})
        folder.remove(MANIFEST)
        folder.clear(keeps=(STARTED, *keeps))
        folder.write_json(STARTED, {"inputs": plain})
    return decision


def _refuse_foreign_files(folder: Folder, keeps: tuple[str, ...]) -> None:
    """Refuses to empty a folder that holds what no stage wrote.

    Raises:
        InputError: it has files and no mark of a stage, or files beside those that the stage wrote.
    """
    files = [name for name in folder.files() if not any(fnmatch.fnmatchcase(name.partition("/")[0], k) for k in keeps)]
    wrote = folder.read_json(MANIFEST).get("wrote") if MANIFEST in files else None
    if wrote is not None:
        known = {STARTED, MANIFEST, *wrote}
        foreign = [name for name in files if name.partition("/")[0] not in known]
    else:
        marked = MANIFEST in files or STARTED in files
        foreign = [name for name in files if not (marked and may_be_a_stages(name))]
    if foreign:
        raise InputError(
            f"{folder.url} holds files that no stage wrote ({', '.join(foreign[:3])}{', …' if len(foreign) > 3 else ''}), "
            "and would be emptied; move them elsewhere or give another run_dir"
        )


def finish(
    folder: Folder,
    inputs: Mapping[str, Any],
    notes: Mapping[str, Any],
    *,
    seconds: float,
    watches: tuple[str, ...] = (),
) -> Outcome:
    """Marks the folder as finished.

    Args:
        folder: of the stage.
        inputs: as given to `begin`.
        notes: plain values that the manifest keeps.
        seconds: how long the work took.
        watches: as `Stage.watches`.
    """
    kept = {**notes, "seconds": seconds}
    wrote = [name for name in folder.names() if name != MANIFEST]
    # What the manifest says is complete must be on the disk before it is.
    folder.sync()
    folder.write_json(
        MANIFEST,
        {
            "inputs": _plain(inputs),
            "notes": kept,
            "wrote": wrote,
            **digests_of_data(folder, MANIFEST, but=watches),
            "environment": environment(),
        },
    )
    return Outcome(folder=folder, notes=kept, seconds=seconds, is_reused=False)


def run_stage(stage: Stage, parent: Folder, *, around: Around = lambda name, folder: nullcontext()) -> Outcome:
    """Does a stage's work unless an earlier run did it; returns what came of it.

    Args:
        stage: which one.
        parent: the folder that its folder is in.
        around: entered while the work is done; not where the stage is reused.
    """
    folder = parent.sub(stage.name)
    decision = begin(folder, stage.inputs, keeps=stage.keeps)
    if decision.action == "reuse":
        logger.info("%s: reused from an earlier run", stage.name)
        return read_outcome(folder)
    if decision.action == "resume":
        logger.info("%s: resuming an unfinished stage", stage.name)
    elif decision.changed:
        logger.info("%s: run again, because these inputs changed: %s", stage.name, ", ".join(decision.changed))
    started = time.perf_counter()
    with around(stage.name, folder):
        notes = stage.work(folder)
    outcome = finish(
        folder, stage.inputs, notes, seconds=round(time.perf_counter() - started, 2), watches=stage.watches
    )
    logger.info("%s: done in %.1f s", stage.name, outcome.seconds)
    return outcome


def is_finished(folder: Folder) -> bool:
    """Whether a stage, with any inputs, was finished in the folder."""
    return folder.exists(MANIFEST)


def read_manifest(folder: Folder) -> dict[str, Any]:
    """`inputs`, `notes` and `environment` of a finished stage.

    Raises:
        InputError: no stage was finished in the folder.
    """
    if not is_finished(folder):
        raise InputError(f"{folder.url} holds no finished stage; run that stage first")
    return _read_marker(folder, MANIFEST)


def _read_marker(folder: Folder, marker: str) -> dict[str, Any]:
    content = folder.read_json(marker)
    with reading(folder.file(marker), expected="a JSON object with inputs, and notes where the stage is finished"):
        parts = [content["inputs"], content["notes"]] if marker == MANIFEST else [content["inputs"]]
        if not all(isinstance(part, dict) for part in parts):
            raise TypeError("inputs or notes are no object")
        if marker == MANIFEST:
            float(content["notes"]["seconds"])
    whole: dict[str, Any] = content
    return whole


def read_outcome(folder: Folder) -> Outcome:
    """A stage that was finished before.

    Raises:
        InputError: no stage was finished in the folder.
    """
    notes = read_manifest(folder)["notes"]
    return Outcome(folder=folder, notes=notes, seconds=notes["seconds"], is_reused=True)

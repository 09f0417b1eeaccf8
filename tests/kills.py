"""Kills the real command at random moments and lets it go on: the result is an uninterrupted one's, and nothing is left.

    python tests/kills.py FOLDER --kills 100 --seed 0

FOLDER gets an uninterrupted run of each form, `kills.jsonl` with a line per kill, and the table at the end; the same command
goes on where it was stopped. A run is killed several times, each time at a later moment, and then goes on to its end. A run
that ended otherwise than it should stays in FOLDER for a look.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow_server import Server
from paths import ROOT
from run_results import differences, files_of

DEADLINE = 600.0
"""Seconds that a command may take to end, by itself or after what was done to it."""

SETTINGS = (
    "prompts.max_batches=6",
    "prompts.max_test_examples=8",
    "finetune.epochs=2",
    "finetune.batches_per_step=2",
    "finetune.checkpoint_every=1",
    "evaluate.max_new_tokens=8",
    "identify.permutations=500",
    "capture.tokens_per_forward=512",
)
FORMS: dict[str, tuple[str, ...]] = {
    # One model process does all; tracking in a file.
    "alone": (),
    # Ray Train's workers, a classifier that judges in actors, and a tracking server.
    "spread": ("finetune.num_workers=2", "evaluate.judge=classifier"),
}
_LONGEST_STAGE = 20.0
"""Seconds of a stage within which its kills come."""
_BYTES_OF_THE_DISK = 300 * 2**20


@dataclass
class Command:
    """The command at work, and what it said so far with the seconds at which it did."""

    process: subprocess.Popen[bytes]
    log: Path
    mark: str
    began: float

    def lines(self) -> list[str]:
        return self.log.read_text(errors="replace").splitlines()

    def ended_stages(self) -> int:
        return sum(": done in" in line or ": reused from" in line for line in self.lines())

    def processes(self) -> dict[int, str]:
        """Every process that this command started, in whatever way, with its title."""
        found = {}
        for path in Path("/proc").iterdir():
            if not path.name.isdigit():
                continue
            try:
                if f"MOE_RAY_KILLS={self.mark}".encode() in (path / "environ").read_bytes().split(b"\0"):
                    state = (path / "stat").read_text().rpartition(")")[2].split()[0]
                    if state != "Z":
                        found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except OSError:  # it has ended meanwhile
                continue
        return found

    def wait(self) -> int:
        return self.process.wait(DEADLINE)

    def orphans(self) -> dict[int, str]:
        """What is still there some time after the command has ended; it is ended then.

        Ray's processes look once in a while whether their parent is there, and a crowded machine makes that late.
        """
        deadline = time.monotonic() + 120
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return left


class Place:
    """Where one kill happens: a run directory, temporary folders of its own, and a disk that can be filled."""

    def __init__(self, folder: Path, form: str, given: Sequence[str]) -> None:
        self.folder, self.form = folder, form
        self.run, self.temporary = folder / "disk" / "run", folder / "tmp"
        self.given = (*SETTINGS, *FORMS[form], *given)
        self.number = 0
        shutil.rmtree(folder, ignore_errors=True)
        for path in (folder / "disk", self.temporary):
            path.mkdir(parents=True)

    def start(self) -> Command:
        self.number += 1
        mark = f"{self.folder.name}-{self.number}-{os.getpid()}"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {
            "MOE_RAY_KILLS": mark,
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(self.temporary),
            # Ray's sockets have paths of at most 107 bytes.
            "RAY_TMPDIR": str(self.temporary),
            # A crowded machine is no fault of a run.
            "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300",
            "RAY_agent_register_timeout_ms": "300000",
        }
        log = self.folder / f"{self.number}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, str(ROOT / "workflows" / "full.py"), str(self.run), *self.given],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=file,
                start_new_session=True,
            )
        return Command(process, log, mark, time.monotonic())

    @contextlib.contextmanager
    def small_disk(self) -> Iterator[None]:
        """The run directory is on a disk of its own."""
        disk = str(self.folder / "disk")
        # Open to everybody, as such a disk is otherwise, it would have the tracking elsewhere than beside the run.
        options = f"size={_BYTES_OF_THE_DISK},mode=700"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", disk], check=True)
        try:
            yield
        finally:
            subprocess.run(["umount", "--lazy", disk], check=True)

    def keep(self) -> None:
        """Copies the run directory off the small disk, for a look."""
        if os.path.ismount(self.folder / "disk"):
            shutil.copytree(self.run, self.folder / "kept", dirs_exist_ok=True)

    def left_over(self) -> list[str]:
        """All that is left in the folder for temporary files but Ray's logs."""
        return sorted(path.name for path in self.temporary.iterdir() if path.name != "ray")


def of_driver(number: int) -> Callable[[Command], str]:
    def kill(command: Command) -> str:
        command.process.send_signal(number)
        return "driver"

    return kill


def of_process(*titles: str) -> Callable[[Command], str]:
    """Kills a process whose title begins so, at once; waits for one to come."""

    def kill(command: Command) -> str:
        deadline = time.monotonic() + 240
        while command.process.poll() is None and time.monotonic() < deadline:
            for pid, title in command.processes().items():
                if any(wanted in title.split(" ")[0] for wanted in titles):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                    return title.split(" ")[0].rpartition("/")[2]
            time.sleep(0.02)
        return ""

    return kill


@dataclass(frozen=True)
class Kind:
    """One way to disturb a run.

    Attributes:
        form: of the run.
        does: does it; returns what was met, empty = nothing was there any more.
        within: stages in which it is done; empty = all.
        statuses: of the command after it.
        says: what the command must say then, if it did not go on to the end.
        ends: the command is waited for before the next kill, since it ends, or what was done must be undone.
    """

    form: str
    does: Callable[[Command], str]
    within: tuple[str, ...] = ()
    statuses: tuple[int, ...] = (0,)
    says: str = ""
    ends: bool = False


KINDS: dict[str, Kind] = {
    "driver": Kind("alone", of_driver(signal.SIGKILL), statuses=(-9,), ends=True),
    "SIGINT": Kind("alone", of_driver(signal.SIGINT), statuses=(130,), says="interrupted; the same command", ends=True),
    "SIGTERM": Kind(
        "alone", of_driver(signal.SIGTERM), statuses=(143,), says="terminated; the same command", ends=True
    ),
    "model process": Kind("alone", of_process("ray::ModelActor"), within=("capture", "evaluate", "finetune")),
    # Ray ends a process that touches an object then, with status 1.
    "raylet": Kind("alone", of_process("/raylet"), statuses=(0, 1, 4), says="Ray", ends=True),
    "disk full": Kind("alone", lambda command: "disk", statuses=(0, 4), says="the disk is full", ends=True),
    "second driver": Kind("alone", lambda command: "lock", within=("prompts", "capture", "identify")),
    "train worker": Kind("spread", of_process("ray::RayTrainWorker"), within=("finetune",)),
    "judge": Kind("spread", of_process("ray::BlockActor", "ray::verdicts"), within=("evaluate/before/figures",)),
    "MLflow server": Kind("spread", lambda command: "server", statuses=(0, 4), says="tracking"),
    "driver of Train": Kind("spread", of_driver(signal.SIGKILL), within=("finetune",), statuses=(-9,), ends=True),
}


@dataclass
class Reference:
    """An uninterrupted run: where it is, when its stages ended, in seconds, and all that it took."""

    run: Path
    ends: list[tuple[str, float]]
    seconds: float


def uninterrupted(folder: Path, form: str, given: Sequence[str]) -> Reference:
    """The run that the others of its form are held against; done once."""
    place_folder, note = folder / f"whole-{form}", folder / f"whole-{form}.json"
    run = place_folder / "disk" / "run"
    if not note.exists():
        place = Place(place_folder, form, given)
        command = place.start()
        ends: list[tuple[str, float]] = []
        while command.process.poll() is None:
            done = [line for line in command.lines() if ": done in" in line]
            for line in done[len(ends) :]:
                ends.append((line.split(" ", 1)[1].partition(":")[0], time.monotonic() - command.began))
            assert time.monotonic() - command.began < DEADLINE, command.lines()[-20:]
            time.sleep(0.05)
        said = "\n".join(command.lines())
        assert command.process.returncode == 0, said
        # What Ray's C++ complains of, and what nobody caught.
        assert " E " not in said, said
        assert "Traceback" not in said, said
        assert not command.orphans()
        assert not place.left_over(), place.left_over()
        note.write_text(json.dumps({"ends": ends, "seconds": time.monotonic() - command.began}))
    known = json.loads(note.read_text())
    return Reference(run, [(name, end) for name, end in known["ends"]], known["seconds"])


def moment(kind: Kind, reference: Reference, chance: random.Random) -> tuple[int, float, str]:
    """When: after how many stages have ended, how many seconds later, and in which stage that is."""
    ends = [0.0, *(end for _, end in reference.ends)]
    names = [name for name, _ in reference.ends]
    fitting = [index for index, name in enumerate(names) if not kind.within or name.startswith(kind.within)]
    stage = chance.choice(fitting)
    # Ray starts within the first stage, which on a crowded machine takes minutes.
    return stage, chance.random() * min(ends[stage + 1] - ends[stage], _LONGEST_STAGE), names[stage]


def disturbed_run(
    names: Sequence[str], place: Place, reference: Reference, server: Server, chance: random.Random
) -> list[dict[str, Any]]:
    """One run with several kills, each at a later moment than the one before, and to its end; a record of each.

    What does not end the command is followed by the next kill of the same command. What the finished run has otherwise than
    an uninterrupted one is a fault of all its kills, since any may be the cause.
    """
    plan = sorted((*moment(KINDS[name], reference, chance), name) for name in names)
    records: list[dict[str, Any]] = []
    open_ones: list[dict[str, Any]] = []
    command, status, is_server_gone = place.start(), None, False
    for after, later, stage, name in plan:
        if status == 0:  # The run has ended: there is nothing to kill any more.
            break
        if status is not None:
            command, status = place.start(), None
        _await_moment(command, after, later)
        record = {
            "kind": name,
            "stage": stage,
            "at": round(time.monotonic() - command.began, 1),
            "met": "",
            "faults": [],
        }
        records.append(record)
        open_ones.append(record)
        if command.process.poll() is None:
            record["is_late"] = command.ended_stages() >= len(reference.ends)
            ballast = place.folder / "disk" / "ballast"
            if name == "second driver":
                record["faults"] += _second_driver(place, command)
            elif name == "disk full":
                _fill(ballast)
            elif name == "MLflow server":
                server.kill()
                is_server_gone = True
            record["met"] = KINDS[name].does(command)
            if not KINDS[name].ends and command.process.poll() is None:
                continue
        status = _ended(command, open_ones, place)
        (place.folder / "disk" / "ballast").unlink(missing_ok=True)
        open_ones = []
        if status and is_server_gone:
            server.start()
            is_server_gone = False
    if status is None:
        status = _ended(command, open_ones, place)
    if is_server_gone:
        server.start()
    # What waited for a lost server is sent by the next command.
    if status or is_server_gone:
        again = place.start()
        last = records[-1]
        if again.wait():
            last["faults"].append("resuming failed: " + "\n".join(again.lines())[-1500:])
        last["resumed"] = round(time.monotonic() - again.began, 1)
        if orphans := again.orphans():
            last["faults"].append(f"left running after the resume: {sorted(orphans.values())}")
    faults = _faults_of_result(place, reference)
    for record in records:
        record["faults"] += faults
        record["whole"] = round(reference.seconds, 1)
        record.setdefault("resumed", None)
    return records


def _await_moment(command: Command, after: int, later: float) -> None:
    """Waits until so many stages have ended, and then so many seconds; no longer than the command lives."""
    while command.process.poll() is None and command.ended_stages() < after:
        time.sleep(0.02)
    until = time.monotonic() + later
    while command.process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)


def _ended(command: Command, records: Sequence[dict[str, Any]], place: Place) -> int:
    """Waits for the command's end, and notes in the records of its kills what is wrong with it."""
    status = command.wait()
    ended = time.monotonic() - command.began
    lines = command.lines()
    orphans = command.orphans()
    # What goes on after a kill may still end with the status of one before the last.
    allowed = {code for record in records for code in KINDS[record["kind"]].statuses if code > 0}
    last = records[-1]
    allowed |= set(KINDS[last["kind"]].statuses)
    if not last["met"] or last.get("is_late"):
        allowed.add(0)
    if last.get("is_late"):
        # Python takes its handlers away while it ends; a signal then ends the process, whose work is done.
        allowed |= {-signal.SIGINT, -signal.SIGTERM}
    for record in records:
        record |= {"status": status, "ended": round(ended, 1)}
        faults = record["faults"]
        if status not in allowed:
            faults.append(f"status {status}, expected one of {sorted(allowed)}: " + "\n".join(lines)[-300:])
        if status > 0 and not any(
            KINDS[each["kind"]].says in lines[-1] for each in records if KINDS[each["kind"]].says
        ):
            faults.append(f"last line {lines[-1]!r} does not say {KINDS[last['kind']].says!r}")
        # Lines of Ray's other processes begin with their names; Ray Train's gives an account of each worker that it lost.
        if any("Traceback" in line and not line.startswith("(") for line in lines):
            faults.append("a traceback")
        if orphans:
            faults.append(f"left running: {sorted(orphans.values())}")
    return status


def _faults_of_result(place: Place, reference: Reference) -> list[str]:
    """What a finished run has otherwise than the uninterrupted one: results, files, and temporary files left over."""
    faults = []
    if left := place.left_over():
        faults.append(f"left in the temporary folder: {left}")
    if not (place.run / "summary.json").exists():
        return [*faults, "no summary"]
    faults += differences(reference.run, place.run)
    if extra := files_of(place.run) ^ files_of(reference.run):
        faults.append(f"files of only one of both runs: {sorted(extra)}")
    return faults


def _second_driver(place: Place, first: Command) -> list[str]:
    """Starts the same command beside the first; it must be refused at once, and the first not be disturbed."""
    second = place.start()
    status, said = second.wait(), "\n".join(second.lines())
    if status == 2 and "is at work in" in said and "Traceback" not in said:
        return []
    if status == 0 and first.process.poll() is not None:
        return []  # The first had ended before the second one came to the lock.
    return [f"the second driver ended with {status} and said: {said[-300:]}"]


def _fill(ballast: Path) -> None:
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(2**16))
        except OSError:
            pass


def with_mounts() -> bool:
    """Whether this process may mount a disk of its own that nobody else sees."""
    return shutil.which("unshare") is not None and not subprocess.run(["unshare", "-m", "true"], check=False).returncode


def planned(kills: int, kinds: Sequence[str], per_run: int, seed: int) -> list[tuple[str, list[str]]]:
    """Runs, each with its form and its kills, so that every kind comes as often as every other."""
    chance = random.Random(seed)
    of_forms: dict[str, list[str]] = {}
    for number in range(kills):
        name = kinds[number % len(kinds)]
        of_forms.setdefault(KINDS[name].form, []).append(name)
    runs = []
    for form, names in of_forms.items():
        chance.shuffle(names)
        runs += [(form, names[start : start + per_run]) for start in range(0, len(names), per_run)]
    chance.shuffle(runs)
    return runs


def left_of(form: str, names: Sequence[str], records: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """The run that gets the kills for which another one, which went on to its end after an earlier one, had no time."""
    left = Counter(names) - Counter(record["kind"] for record in records)
    return [(form, sorted(left.elements()))] if left else []


def kill_runs(
    folder: Path, model: Path, *, kills: int, seed: int, kinds: Sequence[str], per_run: int = 1
) -> list[dict[str, Any]]:
    """All kills, each a record; runs that are recorded already are not done again."""
    path = folder / "kills.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {record["run"] for record in records}
    classifier = folder / "classifier"
    if not classifier.exists():
        from tiny_classifier import save_tiny_classifier

        save_tiny_classifier(classifier)
    server = Server(folder)
    if any(KINDS[kind].form == "spread" for kind in kinds):
        server.start()
    given = {
        "alone": (f"model.path={model}",),
        "spread": (f"model.path={model}", f"evaluate.classifier={classifier}", f"tracking.uri={server.uri}"),
    }
    runs = planned(kills, kinds, per_run, seed)
    try:
        for number, (form, names) in enumerate(runs):
            if number in done:
                runs += left_of(form, names, [record for record in records if record["run"] == number])
                continue
            reference = uninterrupted(folder, form, given[form])
            place = Place(folder / f"k{number}", form, given[form])
            with place.small_disk() if "disk full" in names else contextlib.nullcontext():
                found = disturbed_run(names, place, reference, server, random.Random(f"{seed} {number}"))
                if any(record["faults"] for record in found):
                    place.keep()
            found = [{"run": number, **record} for record in found]
            with path.open("a") as file:
                file.writelines(json.dumps(record) + "\n" for record in found)
            records += found
            runs += left_of(form, names, found)
            for record in found:
                print(
                    f"run {number}: {record['kind']} in {record['stage']} after {record['at']:.0f} s: status "
                    f"{record['status']}, resumed in {record['resumed']} of {record['whole']} s: "
                    f"{'; '.join(record['faults']) or 'equal'}",
                    flush=True,
                )
            if not any(record["faults"] for record in found):
                shutil.rmtree(place.folder, ignore_errors=True)
    finally:
        server.kill()
    return records


def table(records: Sequence[dict[str, Any]]) -> str:
    """A row per kind: kills, how many met a run at work, how many ended as they should, and seconds."""
    frame = pd.DataFrame(records)
    frame["equal"] = frame["faults"].str.len() == 0
    frame["hit"] = [bool(record["met"]) and not record.get("is_late") for record in records]
    rows = frame.groupby("kind", sort=False).agg(
        kills=("kind", "size"),
        hit=("hit", "sum"),
        equal=("equal", "sum"),
        stages=("stage", "nunique"),
        whole_s=("whole", "mean"),
        killed_at_s=("at", "mean"),
        resumed_s=("resumed", "mean"),
        resumed_most_s=("resumed", "max"),
    )
    return rows.round(1).to_string(na_rep="-")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="short, since Ray's sockets are below it, such as /tmp/kills")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--per-run", type=int, default=4, help="kills of one run, one after the other")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--model", type=Path, help="checkpoint folder; the embedded model, unless given")
    arguments = parser.parse_args()
    # A shell starts what it puts into the background with SIGINT ignored, and every process below would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "disk full" in arguments.kinds and "MOE_RAY_MOUNTS" not in os.environ:
        if with_mounts():
            os.environ["MOE_RAY_MOUNTS"] = "1"
            os.execvp("unshare", ["unshare", "-m", sys.executable, *sys.argv])
        print("disk full: left out, since this user may not mount a disk")
        arguments.kinds.remove("disk full")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.model is None:
        from moe_ray.organisms import build_embedded

        arguments.model = build_embedded(ROOT / ".cache")
    records = kill_runs(
        arguments.folder.resolve(),
        arguments.model,
        kills=arguments.kills,
        seed=arguments.seed,
        kinds=arguments.kinds,
        per_run=arguments.per_run,
    )
    print(table(records))
    return int(any(record["faults"] for record in records))


if __name__ == "__main__":
    sys.exit(main())

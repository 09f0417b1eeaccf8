"""A stage is reused, resumed or begun anew in one place, by what its output depends on and nothing else."""

import os
from contextlib import contextmanager
from dataclasses import replace

import pytest

from moe_ray.errors import InputError
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage import (
    MADE,
    MANIFEST,
    STARTED,
    Stage,
    begin,
    decide,
    finish,
    is_finished,
    read_manifest,
    read_outcome,
    run_stage,
)


@pytest.fixture(params=["local", "memory"])
def parent(request, tmp_path):
    return Folder.open(str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}")


def counting_stage(inputs, calls, name="capture"):
    """A stage that writes what it was called with, and goes on from what its folder holds."""

    def work(folder):
        calls.append(folder.names())
        folder.write_json("output.json", inputs)
        return {"size": len(inputs), MADE: {"output": str(inputs)}}

    return Stage(name=name, inputs=inputs, work=work)


def test_equal_inputs_reuse_the_output(parent):
    calls = []
    first = run_stage(counting_stage({"a": 1, "b": (1, 2)}, calls), parent)
    again = run_stage(counting_stage({"a": 1, "b": [1, 2]}, calls), parent)
    assert (first.is_reused, again.is_reused, len(calls)) == (False, True, 1)
    assert again.notes == first.notes
    assert again.made("output") == first.made("output")
    assert again.seconds == first.seconds


def test_other_inputs_empty_the_folder_and_are_named(parent, caplog):
    calls = []
    run_stage(counting_stage({"a": 1, "b": 2}, calls), parent)
    with caplog.at_level("INFO"):
        assert not run_stage(counting_stage({"a": 2, "c": 0}, calls), parent).is_reused
    assert calls[1] == [STARTED]
    assert "capture: run again, because these inputs changed: a, b, c" in caplog.messages


def test_unfinished_work_of_equal_inputs_is_handed_to_the_work_as_it_is(parent, caplog):
    def dies(folder):
        folder.write_json("part.json", 1)
        raise KeyboardInterrupt

    calls = []
    with pytest.raises(KeyboardInterrupt):
        run_stage(Stage(name="capture", inputs={"a": 1}, work=dies), parent)
    with caplog.at_level("INFO"):
        run_stage(counting_stage({"a": 1}, calls), parent)
    assert "part.json" in calls[0]
    assert "capture: resuming an unfinished stage" in caplog.messages


def test_unfinished_work_of_other_inputs_is_begun_anew(parent):
    folder = parent.sub("capture")
    begin(folder, {"a": 1})
    folder.write_json("part.json", 1)
    assert begin(folder, {"a": 2}).action == "begin"
    assert not folder.exists("part.json")


def test_deciding_changes_nothing(parent):
    folder = parent.sub("capture")
    folder.write_json("old.json", 1)
    assert decide(folder, {"a": 1}).action == "begin"
    assert folder.names() == ["old.json"]


def test_what_is_around_a_stage_is_open_for_the_work_and_not_for_a_reuse(parent):
    opened = []

    @contextmanager
    def around(name, folder):
        opened.append(name)
        yield
        opened.append("closed")

    for _ in range(2):
        run_stage(counting_stage({"a": 1}, [], name="evaluate/before"), parent, around=around)
    assert opened == ["evaluate/before", "closed"]


def test_a_manifest_records_inputs_notes_versions_and_commit(parent):
    folder = parent.sub("capture")
    finish(folder, {"a": 1}, {"rows": 3}, seconds=1.5)
    manifest = read_manifest(folder)
    assert manifest["inputs"] == {"a": 1}
    assert manifest["notes"] == {"rows": 3, "seconds": 1.5}
    assert manifest["environment"]["versions"]["torch"]
    assert "git_commit" in manifest["environment"]
    assert is_finished(folder)


def test_a_folder_without_a_manifest_is_no_finished_stage(parent):
    begin(parent.sub("capture"), {"a": 1})
    assert not is_finished(parent.sub("capture"))
    with pytest.raises(InputError, match="holds no finished stage"):
        read_outcome(parent.sub("capture"))


def test_a_work_that_fails_leaves_no_manifest(parent):
    def fails(folder):
        raise ValueError("a fault of ours")

    with pytest.raises(ValueError, match="a fault of ours"):
        run_stage(Stage(name="capture", inputs={}, work=fails), parent)
    assert not parent.sub("capture").exists(MANIFEST)


def test_stages_inside_outlive_a_new_beginning(parent):
    folder = parent.sub("sweep")
    begin(folder, {"space": 0})
    finish(folder.sub("trials").sub("a"), {}, {}, seconds=1.0)
    folder.write_json("table.json", 1)
    begin(folder, {"space": 1}, keeps=("trials", "round_*"))
    assert is_finished(folder.sub("trials").sub("a"))
    assert not folder.exists("table.json")


def test_whoever_is_killed_while_a_folder_is_emptied_leaves_no_manifest_over_it(parent, monkeypatch):
    folder = parent.sub("capture")
    folder.write_json("output.json", 1)
    finish(folder, {"a": 1}, {}, seconds=1.0)

    def killed(self, *, keeps=()):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "clear", killed)
        with pytest.raises(KeyboardInterrupt):
            begin(folder, {"a": 2})
    assert decide(folder, {"a": 1}).action == "begin"


def test_inputs_that_no_file_can_hold_are_refused_before_anything_is_emptied(parent):
    folder = parent.sub("capture")
    folder.write_json("output.json", 1)
    with pytest.raises(TypeError):
        begin(folder, {"a": object()})
    assert folder.exists("output.json")


@pytest.mark.parametrize("marked", ["finished", "unfinished", "foreign"])
def test_nothing_that_no_stage_wrote_is_ever_deleted(parent, marked):
    folder = parent.sub("prompts")
    if marked == "finished":
        folder.sub("counts").write_json("part.json", 1)
        finish(folder, {"a": 1}, {}, seconds=1.0)
    elif marked == "unfinished":
        begin(folder, {"a": 1})
        folder.write_json("part.json", 1)
    folder.sub("mine").write_bytes("thesis.txt", b"three years")
    with pytest.raises(InputError, match=r"holds files that no stage wrote \(mine/thesis\.txt\).*move them elsewhere"):
        begin(folder, {"a": 2})
    assert folder.read_bytes("mine/thesis.txt") == b"three years"
    folder.sub("mine").delete()
    assert begin(folder, {"a": 2}).action == "begin"


def test_a_folder_of_prompts_that_is_called_as_a_stage_is_not_emptied(parent):
    folder = parent.sub("prompts")
    folder.write_bytes("harmful.jsonl", b"{}")
    with pytest.raises(InputError, match="harmful"):
        begin(folder, {"a": 1})
    assert folder.names() == ["harmful.jsonl"]


def test_whoever_is_killed_while_a_folder_is_emptied_can_begin_again(parent, monkeypatch):
    folder = parent.sub("capture")
    folder.write_json("output.json", 1)
    finish(folder, {"a": 1}, {}, seconds=1.0)

    def killed(self, *, keeps=()):
        self.fs.rm_file(self.file(MANIFEST)) if self.exists(MANIFEST) else None
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "clear", killed)
        with pytest.raises(KeyboardInterrupt):
            begin(folder, {"a": 2})
    assert folder.exists("output.json")
    assert begin(folder, {"a": 2}).action == "begin"
    assert not folder.exists("output.json")


def test_a_finished_stage_that_lost_a_file_makes_it_again_from_what_is_left(parent, caplog):
    calls = []
    stage = counting_stage({"a": 1}, calls)
    folder = run_stage(stage, parent).folder
    folder.write_json("left.json", 1)
    finish(folder, stage.inputs, {}, seconds=0)
    folder.remove("output.json")
    assert not run_stage(stage, parent).is_reused
    assert calls == [[STARTED], [STARTED, "left.json"]]
    assert any("lacks output.json as it was written; it is made again" in message for message in caplog.messages)
    assert run_stage(stage, parent).is_reused


@pytest.mark.slow
@pytest.mark.parametrize("what", ["lost", "cut", "same size"])
@pytest.mark.parametrize("table", ["risk.parquet", "parts"])
def test_a_part_of_a_table_that_was_lost_or_changed_is_made_again_and_the_others_stay(parent, table, what, caplog):
    calls = []

    def work(folder):
        parts = folder.sub(table)
        calls.append(parts.names())
        for name in ("part-0.parquet", "part-1.parquet"):
            if not parts.exists(name):
                parts.write_bytes(name, b"rows")
        return {MADE: {}}

    stage = Stage(name="identify", inputs={"a": 1}, work=work)
    parts = run_stage(stage, parent).folder.sub(table)
    assert run_stage(stage, parent).is_reused
    if what == "lost":
        parts.remove("part-1.parquet")
    else:
        parts.write_bytes("part-1.parquet", b"ro" if what == "cut" else b"raws")
    assert not run_stage(stage, parent).is_reused
    assert calls == [[], ["part-0.parquet"]]
    assert parts.read_bytes("part-1.parquet") == b"rows"
    assert any(f"lacks {table}/part-1.parquet as it was written" in message for message in caplog.messages)
    assert run_stage(stage, parent).is_reused


@pytest.mark.slow
@pytest.mark.parametrize("name", ["risk.parquet", "masks.npz", "experts.safetensors"])
def test_a_file_that_changed_after_the_stage_is_made_again(parent, name):
    def work(folder):
        folder.write_bytes(name, b"as it was written")
        folder.write_json("about.json", 1)
        return {}

    stage = Stage(name="identify", inputs={"a": 1}, work=work)
    folder = run_stage(stage, parent).folder
    # What says something about the stage is written to later on, such as where its tracked run went.
    folder.write_json("about.json", 2)
    assert run_stage(stage, parent).is_reused
    folder.write_bytes(name, b"as it was wrItten")
    assert not run_stage(stage, parent).is_reused
    assert folder.read_bytes(name) == b"as it was written"


def test_other_stages_inside_and_what_a_stage_watches_itself_are_not_read(parent, monkeypatch):
    def work(folder):
        for name in ("counts", "round_1", "parts"):
            folder.sub(name).write_bytes("part.parquet", b"rows")
        finish(folder.sub("round_1"), {}, {}, seconds=1)
        return {}

    stage = Stage(name="capture", inputs={"a": 1}, work=work, watches=("counts",))
    folder = run_stage(stage, parent).folder
    for name in ("counts", "round_1"):
        folder.sub(name).write_bytes("part.parquet", b"other")
    assert run_stage(stage, parent).is_reused
    folder.sub("parts").write_bytes("part.parquet", b"other")
    assert not run_stage(stage, parent).is_reused


def test_of_what_an_earlier_version_wrote_the_sizes_of_parts_are_compared(parent):
    folder = parent.sub("identify")
    folder.sub("risk.parquet").write_bytes("part", b"rows")
    finish(folder, {"a": 1}, {}, seconds=1)
    manifest = folder.read_json(MANIFEST)
    folder.write_json(MANIFEST, {**manifest, "parts": {"risk.parquet/part": 4}})
    assert begin(folder, {"a": 1}).action == "reuse"
    folder.sub("risk.parquet").write_bytes("part", b"ro")
    assert begin(folder, {"a": 1}).action != "reuse"


def test_a_stage_inside_that_went_is_no_loss(parent):
    calls = []
    stage = replace(counting_stage({"a": 1}, calls), keeps=("round_*",))
    folder = run_stage(stage, parent).folder
    folder.sub("round_1").write_json("x.json", 1)
    finish(folder, stage.inputs, {"seconds": 0}, seconds=0)
    folder.sub("round_1").delete()
    assert run_stage(stage, parent).is_reused


def test_what_a_manifest_says_is_complete_is_on_the_disk_before_it(tmp_path, monkeypatch):
    synced, written = [], []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    monkeypatch.setattr(Folder, "write_json", lambda folder, name, value: written.append((name, len(synced))))
    folder = Folder.open(str(tmp_path))
    folder.write_bytes("output", b"1")
    folder.sub("parts").write_bytes("part", b"2")
    finish(folder, {}, {}, seconds=0)
    assert {str(tmp_path / name) for name in ("output", "parts/part", "parts", "")} <= set(synced)
    assert written == [("manifest.json", len(synced))]


def test_a_file_that_may_go_is_not_missed_and_another_is(parent):
    folder = parent.sub("trial")
    begin(folder, {"a": 1})
    folder.write_bytes("weights", b"w")
    folder.write_bytes("figures", b"f")
    finish(folder, {"a": 1}, {}, seconds=1.0)
    folder.remove("weights")
    assert begin(folder, {"a": 1}, may_go=("weights",)).action == "reuse"
    assert begin(folder, {"a": 1}).action == "resume"

"""A checkpoint is known by its content, part by part, and a table by its rows, however it is cut."""

import shutil
import subprocess

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ray.storage.fingerprint import TableHash, environment, hash_checkpoint


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("config.json", "{ }", "model configuration"),
        ("tokenizer.json", "{ }", "tokenizer"),
        ("tokenizer_config.json", '{"chat_template": "a", "eos_token": "b"}', "tokenizer"),
        ("tokenizer_config.json", '{"chat_template": "b"}', "chat template"),
        ("chat_template.jinja", "b", "chat template"),
        ("model.safetensors", "y", "model weights"),
        ("unknown.txt", "", "model configuration"),
    ],
)
def test_a_checkpoints_hash_says_which_part_of_it_changed(tmp_path, name, text, part):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "a"}')
    (tmp_path / "model.safetensors").write_bytes(b"x" * (17 << 20))
    first = hash_checkpoint(str(tmp_path), "main")
    assert hash_checkpoint(str(tmp_path), "main") == first
    (tmp_path / name).write_text(text)
    second = hash_checkpoint(str(tmp_path), "main")
    assert {key for key in first if first[key] != second[key]} == {part}


def test_a_hub_checkpoint_is_its_name_and_revision():
    assert hash_checkpoint("org/model", "v1") == {"model": "org/model", "model revision": "v1"}


def hash_of(*tables):
    found = TableHash()
    for table in tables:
        found.update(table)
    return found.digest()


ROWS = st.lists(
    st.tuples(st.sampled_from([None, "", "a", "ab", "é"]), st.sampled_from([None, 0, 1, 7]), st.booleans()), max_size=8
)
SCHEMA = pa.schema([("text", pa.string()), ("number", pa.int64()), ("flag", pa.bool_())])


def table_of(rows):
    return pa.Table.from_pylist([dict(zip(SCHEMA.names, row, strict=True)) for row in rows], schema=SCHEMA)


@pytest.mark.slow
@settings(max_examples=150)
@given(ROWS, ROWS, st.integers(0, 8), st.integers(0, 8))
def test_a_tables_hash_depends_on_its_rows_and_their_order_and_not_on_how_it_is_cut(rows, others, first, second):
    table, (begin, end) = table_of(rows), sorted((first, second))
    cut = hash_of(table.slice(0, begin), table.slice(begin, end - begin), table.slice(end))
    assert cut == hash_of(table)
    chunked = pa.concat_tables([table_of(rows[:begin]), table_of(rows[begin:])])
    assert hash_of(chunked) == hash_of(table)
    assert (hash_of(table_of(others)) == hash_of(table)) == (rows == others)
    assert hash_of(table.rename_columns(["other", "number", "flag"])) != hash_of(table)


def test_a_column_without_any_text_counts_as_text_that_is_missing():
    nothing = pa.table({"text": pa.nulls(3)})
    assert hash_of(nothing) == hash_of(pa.table({"text": pa.array([None] * 3, pa.string())}))


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_foreign_repository_runs_no_program_of_its_own(tmp_path, monkeypatch):
    def git(*arguments):
        who = ("-c", "user.name=A", "-c", "user.email=a@example.org")
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("x")
    git("add", "file")
    git("commit", "-m", "one")
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(0o755)
    git("config", "core.fsmonitor", str(program))
    monkeypatch.chdir(tmp_path)
    assert environment()["git_commit"]
    assert not (tmp_path / "ran").exists()

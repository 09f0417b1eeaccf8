"""A run directory in an object store, against a real S3 server: no folders, no rename, other processes that write too."""

from __future__ import annotations

import pandas as pd
import pyarrow as pa
import pytest
from s3_server import BUCKET, S3Server

from moe_ray.errors import InputError, OutsideFailed
from moe_ray.finetuning.adapter_files import copy_adapter
from moe_ray.routing.count_keys import all_keys
from moe_ray.routing.count_tables import counts_to_table
from moe_ray.run_directory import RunDirectory, open_run
from moe_ray.storage.file_digests import changed_files, file_digests
from moe_ray.storage.folder import Folder
from moe_ray.storage.lock import LOCK, locked
from moe_ray.storage.stage import MADE, MANIFEST, STARTED, Stage, run_stage
from moe_ray.testing.simulated_counts import Population, simulate

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def server():
    with S3Server() as server:
        yield server


@pytest.fixture
def folder(server, request):
    return Folder.open(f"s3://{BUCKET}/{request.node.name}/run")


def test_what_is_not_there_is_empty(folder):
    assert folder.names() == folder.files() == folder.sub("counts").parquet_names() == []
    assert not folder.exists("x")
    folder.remove("x")
    folder.clear()
    folder.sub("x").delete()
    assert folder.names() == []


def test_what_another_process_writes_is_seen_at_once(folder, server):
    prefix = folder.path.partition("/")[2]
    folder.write_json("a.json", 1)
    assert folder.names() == ["a.json"]
    server.put(f"{prefix}/b.json", b"2")
    assert folder.names() == ["a.json", "b.json"]
    assert not folder.exists("parts/c.json")
    server.put(f"{prefix}/parts/c.json", b"3")
    assert folder.exists("parts/c.json")
    assert folder.exists("parts")
    assert folder.names() == ["a.json", "b.json", "parts"]
    assert Folder.open(folder.url).sub("parts").names() == ["c.json"]
    server.put(f"{prefix}/a.json", b"11")
    assert folder.read_json("a.json") == 11


def test_a_file_is_written_whole_in_one_request(folder, monkeypatch):
    monkeypatch.setattr(folder.fs, "mv", lambda *args, **options: pytest.fail("renamed"))
    folder.write_bytes("x", b"1" * (6 << 20))
    assert folder.read_bytes("x") == b"1" * (6 << 20)
    assert folder.names() == ["x"]


def test_a_growing_table_is_seen_when_it_is_whole(folder):
    schema = pa.schema([("x", pa.int64())])
    with folder.growing_table("t.parquet", schema, row_group_size=4) as append:
        append(pa.table({"x": [1, 2, 3]}))
        append(pa.table({"x": [4, 5, 6]}))
        assert folder.parquet_names() == []
    assert folder.read_frame("t.parquet")["x"].tolist() == [1, 2, 3, 4, 5, 6]
    assert folder.files() == ["t.parquet"]
    with pytest.raises(KeyError), folder.growing_table("u.parquet", schema, row_group_size=4):
        raise KeyError
    assert folder.files() == ["t.parquet"]


def test_a_stage_is_reused_resumed_and_begun_anew(folder):
    begun = []

    def stage(inputs, fails=False):
        def work(inside):
            begun.append(inside.names())
            inside.write_json("out.json", inputs)
            inside.sub("parts").write_json("part.json", inputs)
            if fails:
                raise KeyError
            return {MADE: {"out": str(inputs)}}

        return Stage(name="identify", inputs=inputs, work=work)

    with pytest.raises(KeyError):
        run_stage(stage({"a": 1}, fails=True), folder)
    assert not run_stage(stage({"a": 1}), folder).is_reused
    assert run_stage(stage({"a": 1}), folder).is_reused
    assert not run_stage(stage({"a": 2}), folder).is_reused
    assert begun == [[STARTED], [STARTED, "out.json", "parts"], [STARTED]]
    assert folder.sub("identify").names() == [STARTED, MANIFEST, "out.json", "parts"]
    folder.sub("identify").sub("parts").delete()
    assert not run_stage(stage({"a": 2}), folder).is_reused


def test_parts_are_read_and_a_changed_one_is_known_by_its_tag(folder, monkeypatch):
    counts = simulate(Population(num_layers=2, num_experts=4, num_experts_per_tok=2), num_batches=2)
    for batch in (0, 1):
        folder.write_table(f"part-{batch}.parquet", counts_to_table(counts.take(counts.batch_idx == batch)))
    assert len(all_keys(folder, folder.parquet_names())) == len(counts)
    digests = file_digests(folder, folder.parquet_names())
    assert all(digest.startswith("tag ") for digest in digests.values())
    folder.write_table("part-0.parquet", pd.DataFrame({"a": [1]}))
    folder.remove("part-1.parquet")
    assert changed_files(folder, digests) == ["part-0.parquet", "part-1.parquet"]


def test_one_driver_at_a_time(folder):
    with locked(folder):
        assert folder.exists(LOCK)
        with pytest.raises(InputError, match="is at work in"), locked(Folder.open(folder.url)):
            pytest.fail("two at a time")
    assert not folder.exists(LOCK)


def test_an_adapter_is_copied(folder):
    header = {"format": 1, "base": "", "base_hash": "", "mask_hash": "", "model_type": ""}
    folder.write_json("adapter.json", header | {"layers": [], "num_experts": 0, "experts": []})
    folder.write_bytes("experts.safetensors", b"weights")
    copy_adapter(folder, folder.sub("copy"))
    assert folder.sub("copy").files() == ["adapter.json", "experts.safetensors"]


def test_a_bucket_that_is_not_there_is_refused_and_not_made(server):
    for _ in range(2):
        with pytest.raises(InputError, match="there is no bucket 'nobodys'"):
            RunDirectory.open("s3://nobodys/run")
    with pytest.raises(InputError, match="there is no bucket ''"):
        RunDirectory.open("s3://")
    with pytest.raises(InputError, match="is not a run directory"):
        open_run(f"s3://{BUCKET}/nothing")


def test_a_store_that_is_not_there_is_the_outsides(server, monkeypatch):
    options = {"endpoint_url": "http://127.0.0.1:1", "config_kwargs": {"retries": {"max_attempts": 0}}}
    monkeypatch.setattr("fsspec.config.conf", {"s3": options})
    with pytest.raises(OutsideFailed, match="does not answer"):
        Folder.open(f"s3://{BUCKET}/run")

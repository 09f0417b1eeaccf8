"""Files wherever they lie: local, by a pattern, in a store, on a server; each read once and named as the user named it."""

import http.server
import json
import threading

import fsspec
import pytest
from prompt_examples import write_lines

from moe_ray.errors import InputError, OutsideFailed
from moe_ray.prompts import prompt_files
from moe_ray.prompts.examples import read_examples
from moe_ray.prompts.prompt_files import places, prefixes

ROWS = [{"prompt": "a", "label": "safe"}, {"prompt": "b", "label": "unsafe"}]
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture
def memory():
    store = fsspec.filesystem("memory")
    store.pipe_file("/prompts/one.jsonl", TEXT.encode())
    store.pipe_file("/prompts/two.csv", b"prompt,label\nc,safe\n")
    store.pipe_file("/prompts/wrong.jsonl", b'{"prompt": "a", "label": "safe"}\n{"prompt": "b"}\n')
    yield store
    store.rm("/prompts", recursive=True)


@pytest.fixture
def server(tmp_path):
    """A web server on this machine alone, and what it was asked for."""
    asked = []
    (tmp_path / "p.jsonl").write_text(TEXT)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *args):
            pass

    def make(*args):
        return Handler(*args, directory=str(tmp_path))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), make) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()
        thread.join()


def test_a_file_of_a_store_gives_what_a_local_one_gives(memory, tmp_path):
    local = read_examples(write_lines(tmp_path / "one.jsonl", ROWS))
    assert read_examples("memory://prompts/one.jsonl") == local


def test_a_pattern_stands_for_the_files_that_it_fits_in_the_order_of_their_names(memory, tmp_path):
    assert [one.id for one in read_examples("memory://prompts/o*")] == ["one:1", "one:2"]
    assert [one.id for one in read_examples(["memory://prompts/t*"])] == ["two:1"]
    for name in ("b", "a"):
        write_lines(tmp_path / f"{name}.jsonl", ROWS)
    assert [one.id for one in read_examples(f"{tmp_path}/*.jsonl")] == ["a:1", "a:2", "b:1", "b:2"]
    with pytest.raises(InputError, match="fits no file"):
        read_examples(f"{tmp_path}/*.parquet")


def test_a_wrong_row_of_a_remote_file_is_named_by_its_address(memory):
    with pytest.raises(InputError, match=r"memory://prompts/wrong\.jsonl:2: label: missing"):
        read_examples("memory://prompts/wrong.jsonl")


@pytest.mark.slow
def test_a_file_of_a_server_is_fetched_once_whatever_its_address_says_behind_the_path(server):
    address, asked = server
    examples = read_examples(f"{address}/p.jsonl?download=true")
    assert [one.id for one in examples] == ["p:1", "p:2"]
    assert asked == ["/p.jsonl?download=true"]


@pytest.mark.slow
def test_what_a_server_does_not_have_or_does_not_answer_is_said_in_one_sentence(server):
    address, _ = server
    with pytest.raises(InputError, match=r"other\.jsonl' does not exist"):
        read_examples(f"{address}/other.jsonl")
    with pytest.raises(OutsideFailed, match="cannot be read now"):
        read_examples("http://127.0.0.1:9/p.jsonl")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("memory://prompts/none.jsonl", "does not exist"),
        ("nonsense://x/p.jsonl", "Protocol not known"),
        ("{tmp}", "is a folder; name its files"),
    ],
)
def test_what_cannot_be_reached_is_named(tmp_path, name, said):
    with pytest.raises(InputError, match=said):
        read_examples(name.format(tmp=tmp_path))


def test_a_missing_package_is_named(monkeypatch):
    def absent(*args, **options):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(prompt_files.fsspec, "open", absent)
    with pytest.raises(InputError, match=r"nothing here reads s3:// .* pip install s3fs"):
        read_examples("s3://bucket/p.jsonl")


def test_the_hub_is_known():
    assert "hf" in fsspec.available_protocols()


def test_files_with_equal_stems_have_their_folders_before_their_ids():
    assert prefixes(["a/p.jsonl", "b/q.csv.gz"]) == ["p", "q"]
    assert prefixes(["x/a/p.jsonl", "x/b/p.json", "r.csv"]) == ["a/p", "b/p", "r"]
    assert prefixes(["x/a/p.jsonl", "y/a/p.jsonl"]) == ["x/a/p", "y/a/p"]
    assert prefixes(["p.jsonl", "p.jsonl"]) == ["p", "p"]
    assert prefixes(["https://h/good_1000/t-0.parquet?x=1", "hf://datasets/n/bad/t-0.parquet"]) == [
        "good_1000/t-0",
        "bad/t-0",
    ]


def test_the_same_file_twice_is_refused(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", ROWS)
    with pytest.raises(InputError, match="used twice"):
        read_examples([path, path])


def test_a_files_name_and_its_folder_say_what_is_in_it():
    assert places("https://h/D/OR-Bench/Toxic.csv?x=y") == ("toxic.csv", "or-bench")
    assert places("/home/harmful/p.jsonl") == ("p.jsonl", "harmful")

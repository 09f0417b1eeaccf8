"""The text of a file: decoded or refused with the place, compressed or not."""

import gzip
import json

import pytest

from moe_ray.errors import InputError
from moe_ray.prompts import text_file
from moe_ray.prompts.examples import read_examples


@pytest.mark.parametrize("piece", [1, 5, 1 << 20])
def test_the_first_byte_that_is_not_utf8_is_named(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(text_file, "_BYTES_PER_READ", piece)
    path = tmp_path / "p.jsonl"
    good = '\ufeff{"prompt": "é😀"}\n'.encode()
    for bad in (b"\xff", b"\xe9 x", b"\xf0\x9f"):
        path.write_bytes(good + bad)
        with pytest.raises(InputError, match=rf"byte {len(good)} is not UTF-8"):
            read_examples(path)


ROW = json.dumps({"prompt": "a", "label": "safe"}).encode()


@pytest.mark.parametrize("name", ["p.jsonl.gz", "P.JSONL.GZ"])
def test_a_compressed_file_is_read_as_what_is_in_it(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + ROW))
    assert [one.messages[0]["content"] for one in read_examples(path)] == ["a"]


def test_a_file_that_only_seems_to_be_compressed_or_is_cut_is_named(tmp_path):
    path = tmp_path / "p.jsonl.gz"
    whole = gzip.compress(ROW * 999)
    for content in (ROW, whole[:-9], whole[:30] + b"x" + whole[31:]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"p\.jsonl\.gz' cannot be (read|decompressed)"):
            read_examples(path)

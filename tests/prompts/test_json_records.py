"""JSON Lines and JSON arrays are read record by record, and what is wrong is named by its line."""

import json
import time
import tracemalloc

import pytest

from moe_ray.errors import InputError
from moe_ray.prompts import json_records
from moe_ray.prompts.examples import read_examples
from moe_ray.prompts.json_records import read_json_array, read_jsonl
from moe_ray.prompts.prompt_files import PromptFile

ROW = {"prompt": "a", "label": "safe"}


def on_disk(path) -> PromptFile:
    return PromptFile(name=str(path), path=path, prefix=path.stem)


def test_an_array_on_one_line_needs_no_ids(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps([{"prompt": "a", "label": "safe"}, {"prompt": "b", "label": "unsafe"}]))
    assert [example.id for example in read_examples(path)] == ["p:1", "p:2"]


def test_records_that_share_a_line_are_told_apart_in_messages(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps([ROW, {"prompt": "b"}, {"prompt": ""}]))
    with pytest.raises(InputError) as error:
        read_examples(path)
    assert "p.json:1 (record 2): label: missing" in str(error.value)
    assert "p.json:1 (record 3): prompt: empty" in str(error.value)


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, ending):
    path = tmp_path / f"p.{ending}"
    text = json.dumps(ROW) if ending == "jsonl" else json.dumps([ROW])
    path.write_text(text, encoding="utf-8-sig")
    assert [example.id for example in read_examples(path)] == ["p:1"]


@pytest.mark.parametrize(("rest", "line"), [(" x", 3), ("\n\n[]", 5), ("]", 3)])
def test_text_after_an_array_is_refused_with_its_line(tmp_path, rest, line):
    path = tmp_path / "p.json"
    path.write_text(f"[\n{json.dumps(ROW)}\n]{rest}")
    with pytest.raises(InputError, match=rf"p\.json:{line}: text after the end of the array"):
        read_examples(path)
    path.write_text(f"[\n{json.dumps(ROW)}\n]\n \n")
    assert len(read_examples(path)) == 1


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 50])
def test_records_are_the_same_wherever_the_text_is_cut(tmp_path, monkeypatch, piece):
    rows = [
        {"prompt": 'quote " backslash \\ \u2028 😀', "n": [1, -2.5e-3, True, None, {"a": "]"}]},
        {"prompt": "x" * 40},
        {"prompt": "😀" * 5, "tabs": "\t\n"},
    ]
    path = tmp_path / "p.json"
    path.write_text(json.dumps(rows, indent=1) + "\n")
    whole = list(read_json_array(on_disk(path)))
    assert [fields for _, _, fields in whole] == rows
    assert [place for _, place, _ in whole] == ["2", "14", "17"]
    monkeypatch.setattr(json_records, "_CHARACTERS_PER_READ", piece)
    assert list(read_json_array(on_disk(path))) == whole


@pytest.mark.parametrize("piece", [3, 1 << 20])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[\n{"a": 1},\n{"a" 2},\n{"a": "' + "x" * 99 + '"}]', r"p\.json:3: not valid JSON \(Expecting ':'"),
        ('[\n{"a": 1},\n\n{"a": "x', r"p\.json:4: not valid JSON \(Unterminated string"),
        ('[\n{"a": "x\ny"}]', r"p\.json:2: not valid JSON \(Invalid control character"),
        ('[{"a": 1}\n', r"p\.json:2: not valid JSON \(Expecting value"),
        ("[\n\n7]", r"p\.json:3: got a int, expected an object"),
    ],
)
def test_a_fault_of_an_array_is_named_by_its_line_wherever_the_text_is_cut(tmp_path, monkeypatch, text, said, piece):
    monkeypatch.setattr(json_records, "_CHARACTERS_PER_READ", piece)
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        list(read_json_array(on_disk(path)))


@pytest.mark.slow
@pytest.mark.parametrize(("read", "indent"), [(read_json_array, None), (read_json_array, 1), (read_jsonl, None)])
def test_time_is_linear_and_memory_does_not_grow_with_the_file(tmp_path, read, indent):
    path, seconds, peaks = tmp_path / "p.json", [], []
    for number in (5_000, 40_000):
        rows = [{"prompt": f"{n} {'word ' * 40}", "label": "safe"} for n in range(number)]
        path.write_text(
            json.dumps(rows, indent=indent) if read is read_json_array else "\n".join(map(json.dumps, rows))
        )
        del rows
        started = time.process_time()
        assert sum(1 for _ in read(on_disk(path))) == number
        seconds.append(time.process_time() - started)
        tracemalloc.start()
        for _ in read(on_disk(path)):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # Counting the lines from the beginning for each record made it 64 times.
    assert seconds[1] < 24 * seconds[0]
    assert peaks[1] < peaks[0] + (4 << 20)

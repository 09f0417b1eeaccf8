"""`moe-ray upcycle` writes a checkpoint that equals the dense model, once, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from dense_checkpoints import CHAT_TEMPLATE, LOGIT_TOLERANCE, make_dense, make_folder, make_zip
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_ray.cli import upcycle
from moe_ray.cli.main import main as moe_ray
from moe_ray.models.expert_copies import experts_are_copies
from moe_ray.upcycling.upcycle import max_logit_difference


def test_upcycle_writes_a_checkpoint_that_equals_the_dense_model(tmp_path: Path) -> None:
    dense, out = make_dense(), tmp_path / "runs" / "out"
    source = make_folder(tmp_path / "dense", dense)
    assert moe_ray(["upcycle", str(source), str(out), "--num-experts", "4", "--num-experts-per-tok", "2"]) == 0
    moe, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert (moe.config.num_local_experts, moe.config.num_experts_per_tok) == (4, 2)
    assert max_logit_difference(dense, moe, tokenizer, ["some text", "other text"]) < LOGIT_TOLERANCE
    assert (tokenizer.chat_template, tokenizer.pad_token) == (CHAT_TEMPLATE, "<|endoftext|>")
    assert (moe.generation_config.eos_token_id, moe.generation_config.pad_token_id) == (2, 0)
    assert json.loads((out / "upcycle.json").read_text())["max_abs_logit_difference"] < LOGIT_TOLERANCE
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert str(tmp_path) not in "".join(path.read_text() for path in out.glob("*.json"))


def test_upcycle_stores_bfloat16_and_compares_in_float32(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "dense")
    assert moe_ray(["upcycle", str(source), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_upcycle_returns_at_once_when_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["upcycle", str(make_folder(tmp_path / "dense")), str(tmp_path / "out")]
    assert moe_ray(command) == 0
    assert moe_ray([*command, "--check"]) == 0
    monkeypatch.setattr(upcycle, "load_dense", lambda *_, **__: pytest.fail("loaded again"))
    assert moe_ray(command) == 0


def test_upcycle_never_overwrites_another_upcycle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["upcycle", str(make_folder(tmp_path / "dense")), str(tmp_path / "out")]
    assert moe_ray(command) == 0
    assert moe_ray([*command, "--seed", "1"]) == 2
    assert "holds something else (differs in seed)" in capsys.readouterr().err


def test_upcycle_refuses_and_removes_a_checkpoint_with_other_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_folder(tmp_path / "dense")
    monkeypatch.setattr(upcycle, "max_logit_difference", lambda *_: float("nan"))
    assert moe_ray(["upcycle", str(source), str(tmp_path / "out")]) == 2
    assert "logits nan away" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


TEXTS = ("some text", "other text", "what is this", "and that", "more of it")


def split_command(folder: Path, *options: str, texts: Sequence[str] = TEXTS) -> list[str]:
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text, "label": "safe"}) + "\n" for text in texts))
    source = make_folder(folder / "dense", make_dense(max_position_embeddings=512, intermediate_size=96))
    return ["upcycle", str(source), str(folder / "out"), "--method", "split", "--calibrate-on", str(prompts), *options]


@pytest.mark.slow
def test_upcycle_splits_and_says_what_that_costs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert moe_ray(split_command(tmp_path, "--num-experts", "6", "--num-experts-per-tok", "4")) == 0
    moe = AutoModelForCausalLM.from_pretrained(out)
    assert (moe.config.num_local_experts, moe.config.num_experts_per_tok) == (6, 4)
    assert not experts_are_copies(moe)
    record = json.loads((out / "upcycle.json").read_text())
    assert (record["method"], record["num_experts"], record["num_experts_per_tok"]) == ("split", 6, 4)
    assert record["max_abs_logit_difference"] < LOGIT_TOLERANCE
    assert set(record["nats_per_token"]) == {"dense", "4"}
    assert set(record["nats_per_token"]["4"]) == {"neutral", "answers"}


@pytest.mark.slow
def test_what_too_few_prompts_leave_unmeasured_is_not_in_the_record(tmp_path: Path) -> None:
    assert moe_ray(split_command(tmp_path, "--num-experts", "6", "--num-experts-per-tok", "4", texts=TEXTS[:4])) == 0
    record = json.loads((tmp_path / "out" / "upcycle.json").read_text())
    assert set(record["nats_per_token"]["4"]) == {"neutral"}


@pytest.mark.slow
def test_a_split_without_a_number_of_experts_per_token_takes_what_was_measured(tmp_path: Path) -> None:
    command = split_command(tmp_path, "--num-experts", "6", "--max-rise", "100")
    assert moe_ray(command) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_experts_per_tok == 3
    assert moe_ray([*command, "--check"]) == 0


@pytest.mark.slow
def test_a_split_stored_as_bfloat16_is_compared_with_the_room_that_rounding_takes(tmp_path: Path) -> None:
    command = split_command(tmp_path, "--num-experts", "6", "--num-experts-per-tok", "3", "--dtype", "bfloat16")
    assert moe_ray(command) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    record = json.loads((tmp_path / "out" / "upcycle.json").read_text())
    assert LOGIT_TOLERANCE < record["max_abs_logit_difference"] < 0.5


@pytest.mark.slow
def test_only_the_way_that_copies_says_that_experts_are_copies(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert moe_ray(split_command(tmp_path, "--num-experts", "6", "--num-experts-per-tok", "4")) == 0
    assert "are equal" not in caplog.text
    assert moe_ray(["upcycle", str(tmp_path / "dense"), str(tmp_path / "copies")]) == 0
    assert "All experts of a layer are equal" in caplog.text


def test_a_record_from_before_there_were_two_ways_is_of_copies(tmp_path: Path) -> None:
    command = ["upcycle", str(make_folder(tmp_path / "dense")), str(tmp_path / "out")]
    assert moe_ray(command) == 0
    path = tmp_path / "out" / "upcycle.json"
    record = json.loads(path.read_text())
    del record["method"]
    path.write_text(json.dumps(record))
    assert moe_ray(command) == 0
    assert moe_ray([*command, "--method", "split"]) == 2


def no_file(folder: Path) -> list[str]:
    return [str(folder / "missing.whl")]


def no_gguf(folder: Path) -> list[str]:
    return [str(make_zip(folder / "model.whl", **{"pkg/__init__.py": b""}))]


def no_llama(folder: Path) -> list[str]:
    (folder / "dense").mkdir()
    (folder / "dense" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return [str(folder / "dense")]


def too_many_routed(folder: Path) -> list[str]:
    return [str(make_folder(folder / "dense")), "--num-experts-per-tok", "9"]


def split_that_does_not_fit(folder: Path) -> list[str]:
    return [str(make_folder(folder / "dense")), "--method", "split", "--num-experts", "5"]


@pytest.mark.parametrize(
    ("bad_input", "message"),
    [
        (no_file, "source: nothing at"),
        (no_gguf, "got 0 .gguf files"),
        (no_llama, "got model_type 'gpt2'"),
        (split_that_does_not_fit, "num_experts: got 5, expected 2 to 3, since 48 neurons"),
        (too_many_routed, "num_experts_per_tok: got 9 with num_experts 8"),
    ],
)
def test_upcycle_answers_bad_input_with_one_line_and_status_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    bad_input: Callable[[Path], list[str]],
    message: str,
) -> None:
    source, *options = bad_input(tmp_path)
    assert moe_ray(["upcycle", source, str(tmp_path / "out"), *options]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "out").exists()

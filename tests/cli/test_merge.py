"""A run's repaired model as a checkpoint that needs no moe-ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from fake_hub import TOKEN, fake_hub
from families import batch_masks, build, token_ids
from huggingface_hub import ModelCard
from text_batches import BATCHES, EXPERTS
from transformers import AutoModelForCausalLM, AutoTokenizer
from word_tokenizer import make_tokenizer

from moe_ray.cli.main import main
from moe_ray.config import Config
from moe_ray.config.finetune import FinetuneConfig
from moe_ray.config.io import load_config, with_settings
from moe_ray.finetuning.adapter_files import read_adapter_header
from moe_ray.finetuning.fine_tune import fine_tune
from moe_ray.run_directory import RunDirectory
from moe_ray.storage.stage import finish

IDS = token_ids(2, 9)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def run(request, tmp_path):
    """A base checkpoint, a run directory with its learned experts, and the tuned model."""
    base, experts = tmp_path / "base", tmp_path / "run" / "finetune"
    model, tokenizer = build("olmoe", dtype=request.param), make_tokenizer()
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    masks = batch_masks(model, EXPERTS)
    config = FinetuneConfig(epochs=1, learning_rate=1e-2)
    fine_tune(model, tokenizer, BATCHES, masks, config=config, adapter=experts, base=str(base))
    RunDirectory.open(str(tmp_path / "run")).write_config(Config())
    return model


@pytest.mark.slow
@pytest.mark.parametrize("base", [[], ["--base", "base"]])
def test_the_merged_checkpoint_is_the_tuned_model(run, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["merge", "run", "repaired", *base]) == 0
    repaired = AutoModelForCausalLM.from_pretrained("repaired", experts_implementation="eager").eval()
    assert repaired.dtype == run.dtype
    # The tuned model was built with its rotary buffers in its type; a checkpoint that is loaded has them in float32.
    repaired.model.rotary_emb = run.model.rotary_emb
    with torch.no_grad():
        assert torch.equal(repaired(IDS).logits, run(IDS).logits)
    assert AutoTokenizer.from_pretrained("repaired")("how are")["input_ids"] == make_tokenizer()("how are")["input_ids"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "repaired", "run"]


@pytest.mark.slow
def test_another_base_is_refused_and_nothing_is_written(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    other = build("olmoe", dtype=run.dtype)
    with torch.no_grad():
        other.model.layers[0].mlp.experts.down_proj += 1.0
    other.save_pretrained("other")
    make_tokenizer().save_pretrained("other")
    assert main(["merge", "run", "repaired", "--base", "other"]) == 2
    assert "not those it was trained from" in capsys.readouterr().err
    assert not (tmp_path / "repaired").exists()


def test_a_folder_that_holds_files_is_left_alone(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["merge", "run", "base"]) == 2
    assert "already holds files" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere", "not a run directory"),
        ("base", "not a run directory"),
        ("untrained", "holds no finetune/adapter.json; give the directory of a run that finished the stage 'finetune'"),
    ],
)
def test_a_folder_without_learned_experts_is_refused(run, name, reason, tmp_path, monkeypatch, capsys):
    RunDirectory.open(str(tmp_path / "untrained")).write_config(Config())
    monkeypatch.chdir(tmp_path)
    assert main(["merge", name, "repaired"]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "repaired").exists()
    assert not (tmp_path / name / "finetune").exists()


@pytest.mark.slow
@pytest.mark.parametrize("run", [torch.float32], indirect=True)
def test_the_card_says_what_it_is_made_of_and_the_settings_make_it_again(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    config = with_settings(
        Config(), {"run_dir": str(tmp_path / "run"), "seed": 3, "prompts.files": [f"{tmp_path}/secret/mine.csv"]}
    )
    RunDirectory.open(str(tmp_path / "run")).write_config(config)
    assert main(["merge", "run", "repaired"]) == 0
    text = (tmp_path / "repaired" / "README.md").read_text()
    about = ModelCard(text).data
    assert (about.license, about.library_name, about.base_model) == ("apache-2.0", "transformers", None)
    header = read_adapter_header(tmp_path / "run" / "finetune")
    assert header["mask_hash"] in text
    assert header["base_hash"] in text
    assert "mine.csv" in text
    assert str(tmp_path) not in text
    again = load_config(str(tmp_path / "repaired" / "reproduce.yaml"))
    assert again == replace(config, run_dir=again.run_dir)
    assert "made without --push-to-hub" in (tmp_path / "repaired" / "reproduce.yaml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("run", [torch.float32], indirect=True)
def test_a_merged_model_is_pushed_as_it_lies_in_its_folder(run, tmp_path):
    with fake_hub() as server:
        done = push(server, tmp_path, "me/olmoe-repaired", "--private")
    assert done.returncode == 0, done.stderr
    assert f"pushed to {server.url}/me/olmoe-repaired" in done.stderr
    assert server.private["me/olmoe-repaired"]
    sent = server.files["me/olmoe-repaired"]
    written = {path.name: path.read_bytes() for path in (tmp_path / "repaired").iterdir()}
    assert sent == written
    assert {"README.md", "reproduce.yaml", "config.json", "model.safetensors"} <= sent.keys()


@pytest.mark.slow
@pytest.mark.parametrize("run", [torch.float32], indirect=True)
def test_what_is_pushed_names_no_folder_of_the_machine(run, tmp_path):
    attic = tmp_path / "attic"
    attic.mkdir()
    base = (tmp_path / "base").rename(attic / "base")
    for name in ("config.json", "tokenizer_config.json"):
        file = base / name
        # What earlier versions of transformers wrote.
        old = {"_name_or_path": str(base), "name_or_path": str(base), "special_tokens_map_file": f"{attic}/map.json"}
        file.write_text(json.dumps(json.loads(file.read_text()) | old))
    directory = RunDirectory.open(str(tmp_path / "run"))
    files = [f"{attic}/mine.csv", "~/attic/theirs.jsonl", "attic/third.jsonl", f"file://{attic}/a.csv", "s3://b/c.csv"]
    settings = {
        **{"run_dir": str(attic / "run"), "cache_dir": "~/attic", "tracking.uri": f"sqlite:///{attic}/mlflow.db"},
        **{"model.path": str(base), "model.vllm_options": {"download_dir": str(attic / "new")}, "prompts.files": files},
        **{"evaluate.neutral_file": "attic/texts.txt", "evaluate.judge_check": f"{attic}/check.json"},
        **{"evaluate.guard": str(attic / "guard"), "harness.lm_eval": ["hellaswag", "attic/own.yaml"]},
    }
    directory.write_config(with_settings(Config(), settings))
    finish(directory.sub("prompts"), {}, {"made": {"examples": "0123abcd", "targets": "4567cdef"}}, seconds=1.0)
    with fake_hub() as server:
        done = push(server, tmp_path, "me/olmoe-repaired", "--base", str(base))
    assert done.returncode == 0, done.stderr
    sent = server.files["me/olmoe-repaired"]
    places = (b"attic", str(tmp_path).encode())
    telling = [line for data in sent.values() for line in data.splitlines() if any(place in line for place in places)]
    assert telling == []
    text = sent["reproduce.yaml"].decode()
    assert "put them beside this file" in text
    assert "examples 0123abcd, targets 4567cdef" in text
    (tmp_path / "sent.yaml").write_text(text)
    again = load_config(str(tmp_path / "sent.yaml"))
    assert again.prompts.files == ("mine.csv", "theirs.jsonl", "third.jsonl", "a.csv", "s3://b/c.csv")
    assert (again.model.path, again.evaluate.guard) == ("./base", "./guard")
    assert (again.evaluate.neutral_file, again.harness.lm_eval) == ("texts.txt", ("hellaswag", "own.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "refuses", "token", "said"),
    [
        ("me/olmoe", 403, TOKEN, "pushing to 'me/olmoe': the hub answered 403"),
        ("a/b/c", 0, TOKEN, "expected a name such as 'user/name'"),
        ("me/olmoe", 0, "", "there is no token of the hub"),
    ],
)
@pytest.mark.parametrize("run", [torch.float32], indirect=True)
def test_what_the_hub_will_not_take_is_refused_before_anything_is_merged(run, tmp_path, name, refuses, token, said):
    with fake_hub() as server:
        server.fails_with = refuses
        done = push(server, tmp_path, name, token=token)
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "repaired").exists()


def push(server, folder, name, *more, token=TOKEN):
    """`moe-ray merge --push-to-hub` in a process of its own: the hub's address is read when the library is imported."""
    code = "import sys; from moe_ray.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "merge", "run", "repaired", "--push-to-hub", name, *more]
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
        **{"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "hf")},
        **({"HF_TOKEN": token} if token else {}),
    }
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

import pytest

from moe_ray.config import Config
from moe_ray.config.for_others import checkpoint_for_others, is_place, name_of_place, settings_for_others
from moe_ray.config.io import with_settings


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("/home/ada/work/mine.csv", "mine.csv"),
        ("~/mine.csv", "mine.csv"),
        ("../data/mine.csv", "mine.csv"),
        ("data/mine.csv", "mine.csv"),
        ("mine.csv", "mine.csv"),
        ("/home/ada/*/part-*.jsonl", "*/part-*.jsonl"),
        ("file:///home/ada/mine.csv", "mine.csv"),
        ("s3://bucket/data/mine.csv", "s3://bucket/data/mine.csv"),
        ("hf://datasets/me/some@v1/mine.csv", "hf://datasets/me/some@v1/mine.csv"),
        ("s3://key:secret@bucket/mine.csv", "s3://bucket/mine.csv"),
        ("https://ada:secret@host:8000/mine.csv?X-Amz-Signature=abc#top", "https://host:8000/mine.csv"),
        ("zip://mine.csv::file:///home/ada/all.zip", "zip://mine.csv::all.zip"),
    ],
)
def test_a_file_is_named_without_its_folders_and_a_url_without_accounts_and_signatures(text, name):
    assert name_of_place(text) == name


def test_a_checkpoints_folder_is_told_from_a_name_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "olmoe").mkdir(parents=True)
    names = [
        "/home/ada/olmoe",
        "~/olmoe",
        "models/olmoe",
        "a/b/olmoe",
        "allenai/OLMoE",
        "gpt2",
        "embedded",
        "s3://b/olmoe",
    ]
    assert [checkpoint_for_others(name) for name in names] == [
        *["./olmoe"] * 4,
        *("allenai/OLMoE", "gpt2", "embedded", "s3://b/olmoe"),
    ]


def test_files_of_one_name_stay_apart_and_a_folder_that_says_the_label_keeps_its_word():
    def shown(files, labels):
        config = with_settings(Config(), {"prompts.files": files, "prompts.file_labels": labels})
        return settings_for_others(config, names_only=True)["prompts"]["files"]

    assert shown(["/home/ada/a.csv", "/home/bob/a.csv", "embedded"], {}) == ["1/a.csv", "2/a.csv", "embedded"]
    labels = {"Benign": "safe", "toxic": "unsafe"}
    assert shown(["/ada/benign-new/a.csv", "/ada/toxic.csv"], labels) == ["Benign/a.csv", "toxic.csv"]
    assert shown(["/ada/benign/a.csv", "/bob/benign/a.csv"], labels) == ["1/Benign/a.csv", "2/Benign/a.csv"]


def test_only_where_a_run_was_made_is_left_out_of_settings_that_stay_here():
    config = with_settings(Config(), {"prompts.files": ["/home/ada/a.csv"], "tracking.uri": "http://host:5000"})
    settings = settings_for_others(config, names_only=False)
    assert settings["prompts"]["files"] == ["/home/ada/a.csv"]
    assert not {"run_dir", "cache_dir", "tracking", "cluster"} & settings.keys()


def test_paths_are_found_wherever_settings_hold_them_and_texts_stay_texts():
    config = with_settings(
        Config(),
        {
            "prompts.refusal": "/no, I will not.",
            "model.chat_template_options": {"mode": "/no_think"},
            "model.vllm_options": {"download_dir": "/scratch/ada"},
            "evaluate.judge_options": {"a": {"b": "~/ada/key"}},
            "harness.inspect": ["ada/own.py@mine", "inspect_evals/x"],
        },
    )
    settings = settings_for_others(config, names_only=True)
    assert settings["prompts"]["refusal"] == "/no, I will not."
    assert settings["model"]["chat_template_options"] == {"mode": "/no_think"}
    assert settings["model"]["vllm_options"] == {"download_dir": "ada"}
    assert settings["evaluate"]["judge_options"] == {"a": {"b": "key"}}
    assert settings["harness"]["inspect"] == ["own.py@mine", "inspect_evals/x"]


@pytest.mark.parametrize("text", ["Sure", "allenai/OLMoE", "...", "s3://bucket/x", "a/b", ""])
def test_what_could_be_anywhere_is_no_place(text):
    assert not is_place(text)
